"use strict";

const byId = (id) => document.getElementById(id);
const sides = ["a", "b"].map((side) => ({
  model: byId(`model-${side}`), answer: byId(`answer-${side}`), facts: byId(`facts-${side}`),
}));
let running = null; // AbortController of the answers that stream now

async function call(path, body, signal) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const reply = await fetch(path, { ...options, signal });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({}));
  throw new Error(told.error ? told.error.message : `the server answered ${reply.status}`);
}

async function listModels() {
  const models = (await (await call("v1/models")).json()).data;
  sides.forEach((side, place) => {
    const chosen = side.model.value;
    side.model.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    side.model.selectedIndex = Math.min(place, models.length - 1);
    if (models.some((model) => model.id === chosen)) side.model.value = chosen;
  });
}

// Texts of the events of a stream, as they come.
async function* deltas(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice && choice.delta.content) yield choice.delta.content;
    }
  }
}

async function answer(side, question, signal) {
  const started = performance.now();
  let first = null;
  side.answer.textContent = "";
  side.answer.classList.remove("failed");
  side.facts.textContent = "";
  try {
    const reply = await call("v1/chat/completions", { ...question, model: side.model.value, stream: true }, signal);
    for await (const text of deltas(reply)) {
      first ??= performance.now() - started;
      side.answer.textContent += text;
    }
    const total = performance.now() - started;
    side.facts.textContent = `first text after ${Math.round(first ?? total)} ms, all after ${Math.round(total)} ms`;
    return side.answer.textContent;
  } catch (error) {
    if (error.name === "AbortError") {
      side.facts.textContent = "stopped";
    } else {
      side.answer.classList.add("failed");
      side.answer.textContent = error.message;
    }
    return null;
  }
}

// Which answer each aligned model of the two prefers, by its implicit reward.
async function judge(instruction, answers) {
  const verdicts = [];
  const names = sides.map((side) => side.model.value);
  const owners = names[0] === names[1] ? ["the first answer", "the second answer"] : names.map((name) => `the answer of ${name}`);
  for (const name of new Set(names)) {
    const [a, b] = answers.map((response) => ({ instruction, response }));
    const reply = await call("v1/compare", { model: name, pairs: [{ a, b }] }).catch(() => null);
    const comparison = reply && (await reply.json()).data[0];
    if (comparison && comparison.beta > 0) {
      const first = comparison.probability;
      const share = Math.round(100 * Math.max(first, 1 - first));
      verdicts.push(`By its implicit reward, ${name} prefers ${owners[first >= 0.5 ? 0 : 1]} (${share} %).`);
    }
  }
  byId("verdict").textContent = verdicts.join(" ");
}

async function ask(event) {
  event.preventDefault();
  if (running) running.abort();
  const mine = running = new AbortController();
  byId("stop").disabled = false;
  byId("verdict").textContent = "";
  const instruction = byId("instruction").value;
  const question = {
    messages: [{ role: "user", content: instruction }],
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("tokens").value),
  };
  const answers = await Promise.all(sides.map((side) => answer(side, question, mine.signal)));
  if (running !== mine) return;
  running = null;
  byId("stop").disabled = true;
  if (answers.every((text) => text) && answers[0] !== answers[1]) await judge(instruction, answers);
}

byId("ask").addEventListener("submit", ask);
byId("stop").addEventListener("click", () => running && running.abort());
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
listModels().catch((error) => { byId("status").textContent = error.message; });
