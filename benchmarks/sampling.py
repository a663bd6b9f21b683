"""Sampling through Ray Data beside a bare vLLM engine on the same prompts, the engines' start apart.

    python benchmarks/sampling.py [--prompts 1000] [--new-tokens 64] [--repeats 2]

The model is a Llama of 19 million parameters with random weights and the sandbox's tokenizer; both engines get the same
options, as `sample` sets them. On both sides time runs from the engine's readiness to the last answer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from jpo_ray.cluster.sampling import VLLM_CPU_ENV, engine_options, generate
from jpo_ray.cluster.session import ray_session
from jpo_ray.config import SampleConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.evaluation.generation import Request, SampledModel
from jpo_ray.sandbox import BASE_MODEL, make_rows

BARE = "--bare"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    # Ray's workers stand back for other processes; the bare engine does not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    taken: dict[str, list[float]] = {"vllm.LLM.generate": [], "jpo sample": []}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        requests = requests_of(model, given.prompts)
        for _ in range(given.repeats):
            taken["vllm.LLM.generate"].append(bare(requests, given.new_tokens, Path(folder)))
            taken["jpo sample"].append(through_ray(requests, given.new_tokens))
    tokens = given.prompts * given.new_tokens
    table = Table("", "tokens a second, each run", "median", "of the bare engine")
    bare_s = median(taken["vllm.LLM.generate"])
    for name, runs in taken.items():
        each = ", ".join(f"{tokens / run_s:,.0f}" for run_s in runs)
        table.add_row(name, each, f"{tokens / median(runs):,.0f}", f"{bare_s / median(runs):.1%}")
    Console().print(table)


def make_model(folder: Path) -> SampledModel:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # greedy: a logit of zero is never the largest
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", file=sys.stderr)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return SampledModel("model", folder / "model", folder / "model")


def requests_of(model: SampledModel, count: int) -> list[Request]:
    from jpo_ray.data.tokens import Layout, prompt_ids
    from jpo_ray.engine.model import load_tokenizer

    instructions = [row["instruction"] for row in make_rows("test", min(count, 500), 0)]
    instructions = [instructions[number % len(instructions)] for number in range(count)]
    layout = Layout("### Instructions: {instruction}\n\n### Response:", " ", 256)
    prompts = prompt_ids(load_tokenizer(model.path), layout, instructions)
    return [Request(number, model, ids, 0.0, number) for number, ids in enumerate(prompts)]


def through_ray(requests: list[Request], new_tokens: int) -> float:
    """From the engine's readiness to the last answer."""
    config = SampleConfig(engine="vllm", max_new_tokens=new_tokens)
    with ray_session(ClusterConfig()) as ray:
        ready: list[float] = []
        threading.Thread(target=wait_for_engine, args=(ray, ready), daemon=True).start()
        answers = list(generate(ray, ClusterConfig(), config, "vllm", "float32", requests))
        assert [answer.error for answer in answers] == [""] * len(requests)
        return time.monotonic() - ready[0]


def wait_for_engine(ray: Any, ready: list[float]) -> None:
    """Note when the engine's actor has been made: Ray Data does not say."""
    while ray.is_initialized():
        actors = ray._private.state.actors().values()
        if any("vLLMEngineStage" in actor["ActorClassName"] and actor["State"] == "ALIVE" for actor in actors):
            ready.append(time.monotonic())
            return
        time.sleep(0.05)


def bare(requests: list[Request], new_tokens: int, folder: Path) -> float:
    """The same of `vllm.LLM`, in a process of its own."""
    options = engine_options("float32", requests, new_tokens, gpu=False)
    work = {"model": str(requests[0].model.path), "options": options, "prompts": [r.prompt_ids for r in requests]}
    work |= {"new_tokens": new_tokens}
    (folder / "work.json").write_text(json.dumps(work))
    environment = os.environ | VLLM_CPU_ENV | {"OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, __file__, BARE, str(folder / "work.json")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1200)
    return float(done.stdout.splitlines()[-1])


def run_bare(work: dict[str, Any]) -> float:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(model=work["model"], **work["options"])
    asked = SamplingParams(temperature=0.0, max_tokens=work["new_tokens"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in work["prompts"]]
    started = time.monotonic()
    engine.generate(prompts, asked, use_tqdm=False)
    return time.monotonic() - started


if __name__ == "__main__":
    if sys.argv[1:2] == [BARE]:
        print(json.dumps(run_bare(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
