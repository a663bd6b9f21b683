"""Draws the pictures of the site: `python docs/pictures/make.py`. Plain SVG, readable on light and dark pages."""

from pathlib import Path

BLUE, ORANGE, GREY, INK, PAPER = "#2b6cb0", "#c05621", "#a0aec0", "#1a202c", "#f7fafc"


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="{INK}"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>'
    )
    return head + "\n".join(parts) + "</svg>\n"


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="middle">'
        f"{words}</text>"
    )


def box(x: float, y: float, words: str, colour: str, width: float = 64, height: float = 34) -> str:
    left, top = x - width / 2, y - height / 2
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="white" stroke="{colour}" '
        f'stroke-width="2"/>' + text(x, y + 5, words)
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2.5"{dash}/>'


def protocols() -> str:
    """What DPO compares, and what JPO may compare."""
    parts = [text(180, 30, "DPO: two responses to one instruction", 15, weight="bold")]
    parts += [text(560, 30, "JPO: any two items", 15, weight="bold")]
    for shift in (0, 380):
        for row in range(3):
            parts.append(text(shift + 58, 84 + 62 * row, f"instruction {row + 1}", 13))
    for row in range(3):
        y = 79 + 62 * row
        parts.append(line(150, y, 280, y, BLUE))
        parts += [box(150, y, "R", BLUE), box(280, y, "R'", BLUE)]
    right = {(row, side): (530 + 130 * side, 79 + 62 * row) for row in range(3) for side in (0, 1)}
    for row in range(3):
        parts.append(line(*right[row, 0], *right[row, 1], BLUE))
    for one, other in (((0, 1), (1, 0)), ((1, 1), (2, 0)), ((0, 0), (1, 0)), ((1, 1), (2, 1)), ((0, 0), (2, 1))):
        parts.append(line(*right[one], *right[other], ORANGE, dashed=True))
    parts += [box(*place, "R" if side == 0 else "R'", BLUE) for (row, side), place in right.items()]
    parts += [text(215, 260, "N/2 possible comparisons of N items", 13), text(595, 260, "N(N - 1)/2", 13)]
    return svg(760, 280, "Comparisons within one instruction, and between items of different instructions", parts)


def items_and_edges() -> str:
    """The same four comparisons as pairs of texts, and as a graph."""
    parts = [text(170, 30, "as pairs: 8 sequences", 15, weight="bold")]
    parts += [text(560, 30, "as a graph: 4 items", 15, weight="bold")]
    pairs = ["AB", "AC", "BD", "AD"]
    for row, (one, other) in enumerate(pairs):
        y = 72 + 48 * row
        parts += [line(120, y, 220, y, GREY), box(120, y, one, BLUE), box(220, y, other, BLUE)]
    places = {"A": (470, 90), "B": (650, 90), "C": (470, 200), "D": (650, 200)}
    for one, other in pairs:
        parts.append(line(*places[one], *places[other], ORANGE))
    parts += [box(*place, name, BLUE) for name, place in places.items()]
    parts.append(text(170, 272, "8 forward and backward passes", 13))
    parts.append(text(560, 272, "4 passes, one number each; the edges cost nothing", 13))
    return svg(760, 292, "Four comparisons as eight sequences or as four items and four edges", parts)


def pipeline() -> str:
    """Stages, and what each needs."""
    places = {
        "items": (70, 110), "pairs": (190, 60), "judge": (320, 60), "sft": (190, 160), "reference": (330, 160),
        "train": (470, 110), "sample": (590, 110), "evaluate": (710, 110), "report": (830, 110),
    }  # fmt: skip
    arrows = [
        "items pairs", "items sft", "pairs judge", "sft reference", "judge train", "reference train", "train sample",
        "sample evaluate", "evaluate report",
    ]  # fmt: skip
    notes = {
        "items": "your data", "pairs": "MiniLM, Ray Data", "judge": "both orders", "sft": "Ray Train",
        "reference": "Ray Data, cached", "train": "jpo, dpo, ...", "sample": "vLLM", "evaluate": "win rates",
        "report": "HTML, JSON",
    }  # fmt: skip
    parts = []
    for arrow in arrows:
        one, other = arrow.split()
        parts.append(line(*places[one], *places[other], GREY))
    parts += [box(*place, name, BLUE, 92) for name, place in places.items()]
    parts += [text(x, y + 34, notes[name], 11, "#4a5568") for name, (x, y) in places.items()]
    return svg(900, 220, "The stages: items, pairs, judge, sft, reference, train, sample, evaluate, report", parts)


if __name__ == "__main__":
    for draw in (protocols, items_and_edges, pipeline):
        (Path(__file__).parent / f"{draw.__name__}.svg").write_text(draw())
