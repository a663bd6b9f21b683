"""Models of a run that leave it: merged, as adapters, whole; with a card, and to a hub."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.data.tokens import TokenizedItems, tokenize
from jpo_ray.engine.adapters import load_adapter
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all
from jpo_ray.files import read_json, write_json
from pipeline.conftest import Finished
from pipeline.inline import small_config


@pytest.fixture(scope="module")
def merged(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "merged"
    assert export(finished.run_dir, "jpo", out) == 0
    return out


def export(run_dir: Path, model: str, out: Path, *flags: str) -> int:
    return main(["export", "--run-dir", str(run_dir), "--model", model, "--out", str(out), *flags])


def some_items(run_dir: Path) -> TokenizedItems:
    rows = records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()[:20]
    layout = layout_of(small_config().model)
    texts = ([row["instruction"] for row in rows], [row["response"] for row in rows])
    return tokenize(load_tokenizer(run_dir / "sft"), layout, *texts)


def scores_of(model: Any, tokens: TokenizedItems) -> torch.Tensor:
    return score_all(make_scorer(model), tokens, np.arange(len(tokens)), max_tokens=4096)


def test_a_merged_model_says_what_its_adapter_says(finished: Finished, merged: Path) -> None:
    """Log-probs of items and greedy answers, by plain transformers; the SFT model says otherwise."""
    tokens = some_items(finished.run_dir)
    adapter = load_adapter(finished.run_dir / "train" / "jpo", finished.run_dir / "sft", dtype="float32")
    ids = torch.from_numpy(tokens.item(0)[: tokens.prompt_lengths[0]].astype(np.int64)).unsqueeze(0)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    answer = adapter.generate(ids, **options, pad_token_id=0)
    expected = scores_of(adapter, tokens)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(plain.generate(ids, **options), answer)
    assert (scores_of(plain, tokens) - expected).abs().max() < 1e-3
    sft = AutoModelForCausalLM.from_pretrained(finished.run_dir / "sft")
    assert (scores_of(sft, tokens) - expected).abs().max() > 0.1


def test_a_merged_model_is_a_folder_without_anything_of_the_run(finished: Finished, merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "trainer_state.json"}
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert read_json(merged / "generation_config.json")["eos_token_id"] == tokenizer.eos_token_id
    assert list(merged.parent.iterdir()) == [merged]
    assert str(finished.run_dir) not in (merged / "README.md").read_text()


def test_the_card_tells_what_it_is(merged: Path) -> None:
    text = (merged / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["jpo-ray", "joint-preference-optimization", "jpo"]
    assert "base_model" not in found  # `sandbox` is no name on the Hub
    assert "| objective | jpo |" in body
    assert "| beta | 0.2 |" in body
    assert "| lora_r | 8 |" in body
    assert "`sandbox`" in body
    assert "96 items of 48 instructions" in body
    assert "| jpo | " in body
    assert "| sft | " in body


def test_the_cards_program_runs(finished: Finished, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (merged / "README.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    rows = records.read_table(finished.run_dir / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
    program = program.replace("FOLDER", str(merged)).replace("INSTRUCTION", rows[0]["instruction"])
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_adapter_stays_one_and_names_its_base(finished: Finished, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    out = tmp_path / "adapter"
    assert export(finished.run_dir, "jpo", out, "--adapter") == 0
    own = load_file(finished.run_dir / "train" / "jpo" / "adapter_model.safetensors")
    assert all(np.array_equal(value, own[name]) for name, value in load_file(out / "adapter_model.safetensors").items())
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    tokens = some_items(finished.run_dir)
    adapter = load_adapter(finished.run_dir / "train" / "jpo", finished.run_dir / "sft", dtype="float32")
    assert torch.equal(scores_of(loaded.eval(), tokens), scores_of(adapter, tokens))
    named = tmp_path / "named"
    assert export(finished.run_dir, "jpo", named, "--adapter", "--base", "somebody/my-sft") == 0
    assert read_json(named / "adapter_config.json")["base_model_name_or_path"] == "somebody/my-sft"
    front = yaml.safe_load((named / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "somebody/my-sft"
    assert front["library_name"] == "peft"


def test_the_sft_model_is_exported_as_it_is(finished: Finished, tmp_path: Path) -> None:
    assert export(finished.run_dir, "sft", tmp_path / "sft") == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sft", finished.run_dir / "sft"))
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    assert "supervised fine-tuning, the reference" in (tmp_path / "sft" / "README.md").read_text()


@pytest.mark.parametrize(("ends", "expected"), [([7, 9], [7, 9, 2]), ([7, 2], [7, 2]), (7, [7, 2]), (2, 2), (None, 2)])
def test_generation_ends_where_training_closed_responses(
    run_dir: Path, tmp_path: Path, ends: Any, expected: Any
) -> None:
    """Beside whatever ends the base model's answers, which may be several tokens."""
    path = run_dir / "sft" / "generation_config.json"
    config = {key: value for key, value in read_json(path).items() if key != "eos_token_id"}
    write_json(path, config if ends is None else config | {"eos_token_id": ends})
    assert load_tokenizer(run_dir / "sft").eos_token_id == 2
    assert export(run_dir, "sft", tmp_path / "out") == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert found.eos_token_id == expected


def test_a_training_that_is_recorded_as_4_bit_is_exported_with_a_word_on_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_dir / "train" / "jpo" / "base_model.json"
    write_json(record, read_json(record) | {"load_in_4bit": True})
    assert export(run_dir, "jpo", tmp_path / "out") == 0
    assert "trained on 4-bit weights, merged into the unquantised ones" in capsys.readouterr().out
    assert "Trained on 4-bit weights, merged into" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_one_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    run = finished.run_dir
    for command, said in (
        ((run, "gpt", tmp_path / "out"), "--model gpt: "),
        ((run, "gpt", tmp_path / "out"), "there are sft, dpo, jpo"),
        ((tmp_path / "nothing", "jpo", tmp_path / "out"), "no such folder"),
        ((run, "jpo", tmp_path / "full"), "exists already; name a new folder"),
        ((run, "sft", tmp_path / "out", "--adapter"), "`sft` is a whole model"),
        ((run, "jpo", tmp_path / "out", "--base", "a/b"), "--base: is for an adapter that stays one"),
        ((run, "jpo", tmp_path / "out", "--push-to-hub", "me/it"), "no token for the Hub; run `hf auth login`"),
        ((run, "jpo", tmp_path / "out", "--push-to-hub", "it"), "a repository is named OWNER/NAME"),
    ):
        assert export(*command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class Hub(BaseHTTPRequestHandler):
    """The Hub's routes that an upload of small files takes; what came is in `received`."""

    received: ClassVar[dict[str, Any]] = {}
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.received.setdefault("tokens", set()).add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            self.received["repo"] = json.loads(body)
            self.answer({"url": f"{self.base}/me/it", "name": "me/it"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answered = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer({"files": answered})
        elif "/commit/" in self.path:
            self.received["lines"] = [json.loads(line) for line in body.splitlines()]
            self.answer({"commitOid": "0" * 40, "commitUrl": f"{self.base}/me/it/commit/{'0' * 40}", "success": True})
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/it", "modelId": "me/it", "private": True, "siblings": [], "tags": []})

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, content: dict[str, Any]) -> None:
        written = json.dumps(content if self.status == 200 else {"error": "no right to write"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """In the place of the Hugging Face Hub."""
    monkeypatch.setattr(Hub, "received", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_export_is_sent_to_the_hub_as_a_private_repository(
    finished: Finished, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(finished.run_dir, "jpo", tmp_path / "out", "--push-to-hub", "me/it") == 0
    assert hub.received["repo"]["name"] == "it"
    assert hub.received["repo"].get("private") or hub.received["repo"]["visibility"] == "private"
    sent = {line["value"]["path"] for line in hub.received["lines"] if line["key"] == "file"}
    assert sent == {path.name for path in (tmp_path / "out").iterdir()}
    assert hub.received["tokens"] == {"Bearer hf_secret"}
    printed = capsys.readouterr()
    assert "/me/it" in printed.out
    assert "hf_secret" not in printed.out + printed.err


def test_a_hub_that_refuses_is_one_line_and_the_export_stays(
    finished: Finished,
    tmp_path: Path,
    hub: type[Hub],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "status", 403)
    assert export(finished.run_dir, "jpo", tmp_path / "out", "--push-to-hub", "me/it", "--public") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "--push-to-hub me/it: not sent (" in error
    assert f"`hf upload me/it {tmp_path / 'out'}` sends it" in error
    assert "hf_secret" not in error
    assert (tmp_path / "out" / "model.safetensors").exists()
