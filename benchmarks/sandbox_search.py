"""Choose learning rate and beta for each objective on the sandbox's validation split, the same grid for each.

    python benchmarks/sandbox_search.py --run-dir runs/search

One run directory: one SFT model, one reference pass, one adapter per objective and grid point, all sampled by one
engine on the validation instructions. Prints the table that `configs/sandbox.yaml` takes its values from.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from jpo_ray.config_file import parse_config
from jpo_ray.pipeline import STAGES, run_stages

LEARNING_RATES = (5e-4, 1e-3)
BETAS = (0.3, 1.0)
OBJECTIVES = ("jpo", "dpo", "kto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/sandbox.yaml"))
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    values: dict[str, Any] = yaml.safe_load(arguments.config.read_text())
    by_objective = {entry["objective"]: entry for entry in values["train"]}
    values["train"] = [
        by_objective[objective]
        | {"name": f"{objective}-lr{rate:g}-beta{beta:g}", "learning_rate": rate, "beta": beta, "eval_steps": None}
        for objective in OBJECTIVES
        for rate in LEARNING_RATES
        for beta in BETAS
    ]
    values["sample"] = values.get("sample", {}) | {"split": "validation"}
    run_stages(parse_config(values, str(arguments.config)), arguments.run_dir, list(STAGES))
    models = json.loads((arguments.run_dir / "evaluate" / "win_rates.json").read_text())["models"]
    print("\n| objective | learning rate | beta | win rate, mean over temperatures | 95 % interval |")
    print("| --- " * 5 + "|")
    for entry in values["train"]:
        found = models[entry["name"]]
        cells = [entry["objective"], f"{entry['learning_rate']:g}", f"{entry['beta']:g}"]
        cells += [f"{found['win_rate']['mean']:.1f}", "{:.1f} to {:.1f}".format(*found["ci95"])]
        print("| " + " | ".join(cells) + " |")
    for objective in OBJECTIVES:
        mine = [entry for entry in values["train"] if entry["objective"] == objective]
        best = max(mine, key=lambda entry: models[entry["name"]]["win_rate"]["mean"])
        print(f"best for {objective}: learning_rate {best['learning_rate']:g}, beta {best['beta']:g}")


if __name__ == "__main__":
    main()
