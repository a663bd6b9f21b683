const of = id => document.getElementById(id);
const field = of("filter"), temperature = of("temperature"), models = of("models"), base = of("base");
const GOLD = base.options[1].value;
const cards = [...document.querySelectorAll(".sample-card")];
const answersOf = card => [...card.querySelectorAll("[data-temperature]")];

function update() {
  const wanted = field.value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    for (const answer of answersOf(card)) {
      const here = [models.value, base.value].includes(answer.dataset.model) || models.value === "";
      answer.hidden = !here || (temperature.value !== "" && answer.dataset.temperature !== temperature.value);
    }
    const texts = [...card.querySelectorAll(".text")].filter(text => !text.parentElement.hidden);
    card.hidden = !texts.some(text => text.textContent.toLowerCase().includes(wanted));
    shown += !card.hidden;
    if (!card.hidden) compare(card);
  }
  of("shown").textContent = `${shown} of ${cards.length} shown`;
}

// Marks what an answer has and the answer (or gold) it is compared with has not; where only two models are shown, both ways.
function compare(card) {
  const gold = card.querySelector(".gold .text");
  for (const answer of answersOf(card)) {
    const seed = answer.dataset.seed, own = answer.querySelector(".text");
    const name = answer.hidden ? "" : answer.dataset.model === base.value ? models.value : base.value;
    const twin = answersOf(card).find(each => each.dataset.model === name && each.dataset.seed === seed
      && each.dataset.temperature === answer.dataset.temperature);
    const other = name === GOLD ? gold : name && twin ? twin.querySelector(".text") : null;
    mark(own, other && other !== own ? other.textContent : null, answer.dataset.model === base.value);
  }
}

const compared = new WeakMap();  // what each text is marked against: filtering compares nothing again

function mark(element, other, isBase) {
  const against = other === null ? null : `${isBase} ${other}`;
  if ((compared.get(element) ?? null) === against) return;
  compared.set(element, against);
  const text = element.textContent;
  if (other === null) {
    element.textContent = text;
    return;
  }
  const words = pieces(text), kept = common(words.map(word => word.trim()), pieces(other).map(word => word.trim()));
  const parts = [];
  words.forEach((word, place) => {
    const last = parts.at(-1), space = word.match(/^\s*/)[0];
    if (last && last.kept === kept[place]) last.text += word;
    else parts.push({text: space, kept: true}, {text: word.slice(space.length), kept: kept[place]});
  });
  element.replaceChildren(...parts.map(part => {
    if (part.kept) return document.createTextNode(part.text);
    const marked = document.createElement("mark");
    if (isBase) marked.className = "gone";
    marked.textContent = part.text;
    return marked;
  }));
}

// Words and single signs, each with the space before it.
function pieces(text) {
  return text.match(/\s*[\p{L}\p{N}_]+|\s*\S|\s+$/gu) ?? [];
}

// Which of `a` are in a longest common subsequence with `b`.
function common(a, b) {
  const rows = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      rows[i][j] = a[i] === b[j] ? rows[i + 1][j + 1] + 1 : Math.max(rows[i + 1][j], rows[i][j + 1]);
  const kept = new Array(a.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;)
    if (a[i] === b[j]) kept[i++] = (j++, true);
    else if (rows[i + 1][j] >= rows[i][j + 1]) i++;
    else j++;
  return kept;
}

field.addEventListener("input", update);
for (const each of [temperature, models, base]) each.addEventListener("change", update);
update();
