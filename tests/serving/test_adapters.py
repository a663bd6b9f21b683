"""Adapters are checked and copied; a running server takes and gives them up."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from jpo_ray.engine.adapters import record_base
from jpo_ray.serving.adapter_checks import (
    LARGEST_SCALE,
    LARGEST_WEIGHT,
    WEIGHTS,
    AdapterError,
    Shapes,
    base_shapes,
    check_adapter,
)
from jpo_ray.serving.adapters import ADAPTER_CONFIG, AdapterStore, own_folder
from jpo_ray.serving.models import Adapter
from serving.conftest import STORE, store_of
from serving.endpoint import Endpoint
from serving.malformed import PICKLE_RAN, pickled_adapters
from serving.served_run import make_adapter
from serving.traversal import TRAVERSALS


@pytest.fixture(scope="module")
def good(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / STORE / "good", llama, seed=1)


@pytest.fixture
def shapes(llama: Path) -> Shapes:
    return base_shapes(llama)


@pytest.fixture
def store(tmp_path: Path, shapes: Shapes) -> AdapterStore:
    made = AdapterStore(tmp_path / "state", shapes, max_adapters=2, max_rank=8, beta=0.3)
    made.begin([])
    return made


def test_an_adapter_is_copied_and_listed(good: Path, store: AdapterStore) -> None:
    (good / "optimizer.pt").write_bytes(b"not to be copied")
    entry = store.prepare("mine", "good", [good.parent])
    assert (entry.rank, entry.beta, entry.source) == (4, 0.3, str(good))
    assert sorted(path.name for path in Path(entry.folder).iterdir()) == [ADAPTER_CONFIG, WEIGHTS]
    assert store.listed() == {}
    store.add(entry)
    other = AdapterStore(store.root, {}, max_adapters=2, max_rank=8, beta=0.1)
    assert other.listed() == {"mine": entry}
    other.remove("mine")
    assert store.listed() == {}
    assert copies(store) == []
    with pytest.raises(AdapterError, match="no adapter of that name"):
        store.remove("mine")


def copies(store: AdapterStore) -> list[str]:
    return sorted(path.name for path in (store.root / "adapters").iterdir())


def test_no_copy_stays_of_what_is_not_on_the_list(
    good: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(store.prepare("mine", "good", [good.parent]))
    again = store.prepare("mine", "good", [good.parent])  # the same copy
    store.discard(again)
    assert len(copies(store)) == 1
    other = store.prepare("other", "good", [good.parent])
    assert len(copies(store)) == 2
    store.discard(other)
    assert copies(store) == [Path(again.folder).name]
    with pytest.raises(AdapterError, match="other: removed while it was added; add it again"):
        store.add(other)  # the copy that its own addition made went with another's removal

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        store.prepare("other", "good", [good.parent])
    assert copies(store) == [Path(again.folder).name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -101.0])
def test_weights_that_are_no_numbers_or_too_large_are_refused(
    good: Path, shapes: Shapes, tmp_path: Path, value: float
) -> None:
    folder = shutil.copytree(good, tmp_path / "odd")
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[3]
    weights[name][0, 0] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=f"{re.escape(name)} holds [a-z0-9]+; weights beyond 100 overflow"):
        check_adapter(folder, shapes, 8)


def test_weights_of_other_types_are_refused(good: Path, shapes: Shapes, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "eighth")
    save_file(
        {name: value.to(torch.float8_e4m3fn) for name, value in load_file(good / WEIGHTS).items()}, folder / WEIGHTS
    )
    with pytest.raises(AdapterError, match=r"is of torch\.float8_e4m3fn, which is not served"):
        check_adapter(folder, shapes, 8)


def test_servers_have_folders_of_their_own(good: Path, shapes: Shapes, tmp_path: Path) -> None:
    """A second server leaves the first one's list and copies alone, and clears away what a killed one left."""

    def started(folder: Path, *names: str) -> AdapterStore:
        made = AdapterStore(folder, shapes, max_adapters=2, max_rank=8, beta=0.3)
        made.begin([Adapter(name, good, None) for name in names])
        return made

    killed = tmp_path / "server-killed"
    started(killed, "old")
    with own_folder(tmp_path) as first:
        assert not killed.exists()
        store = started(first, "one")
        with own_folder(tmp_path) as second:
            started(second)
            assert second != first
            assert Path(store.listed()["one"].folder).is_dir()
        assert not second.exists()
        assert list(AdapterStore(first, {}, max_adapters=2, max_rank=8, beta=0.1).listed()) == ["one"]
    assert list(tmp_path.glob("server-*")) == []


def test_names_and_room(good: Path, store: AdapterStore) -> None:
    first = store.prepare("first", "good", [good.parent])
    store.add(first)
    with pytest.raises(AdapterError, match="there is an adapter `first` already") as error:
        store.add(first)
    assert error.value.status == 409
    store.add(store.prepare("second", "good", [good.parent]))
    with pytest.raises(AdapterError, match="2 adapters are served already"):
        store.add(store.prepare("third", "good", [good.parent]))
    with pytest.raises(AdapterError, match="3 adapters, and max_adapters is 2"):
        store.begin([Adapter(name, good, None) for name in ("a", "b", "c")])


def test_beta_is_that_of_the_training(good: Path, store: AdapterStore, tmp_path: Path) -> None:
    trained = shutil.copytree(good, tmp_path / "trained")
    (trained / "manifest.json").write_text(json.dumps({"config": {"train": {"beta": 0.7}}}))
    assert store.prepare("a", "trained", [tmp_path]).beta == 0.7
    for beta in ("-1", "0", "true", "1e999", "9" * 400, "[" * 9999):
        (trained / "manifest.json").write_text('{"config": {"train": {"beta": ' + beta + "}}}")
        assert store.prepare("a", "trained", [tmp_path]).beta == 0.3


@pytest.mark.parametrize("folder", TRAVERSALS)
def test_folders_elsewhere_are_refused(good: Path, store: AdapterStore, folder: str) -> None:
    with pytest.raises(AdapterError, match="not within a folder that adapters may come from") as error:
        store.prepare("mine", folder, [good.parent])
    assert error.value.status == 403


def test_links_out_of_the_folder_are_refused(good: Path, store: AdapterStore, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    (allowed / "linked").mkdir(parents=True)
    (allowed / "out").symlink_to(good)
    (allowed / "linked" / ADAPTER_CONFIG).symlink_to(good / ADAPTER_CONFIG)
    (allowed / "linked" / WEIGHTS).symlink_to(good / WEIGHTS)
    for folder in ("out", "linked"):
        with pytest.raises(AdapterError, match="not within"):
            store.prepare("mine", folder, [allowed])


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n", "ä", "a:b"])
def test_names_that_are_none(good: Path, store: AdapterStore, name: str) -> None:
    with pytest.raises(AdapterError, match="name: "):
        store.prepare(name, "good", [good.parent])


def test_pickles_are_not_weights(good: Path, shapes: Shapes, tmp_path: Path) -> None:
    for folder in pickled_adapters(good, tmp_path):
        with pytest.raises(AdapterError, match=r"pickled weights are not loaded|not in the safetensors format"):
            check_adapter(folder, shapes, 8)
    assert not PICKLE_RAN.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "not that of a LoRA adapter"),
        ({"r": "8"}, "not that of a LoRA adapter"),
        ({"r": 16}, "rank 16, and max_lora_rank is 8"),
        ({"use_dora": True}, "use_dora is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not served"),
        ({"bias": "all"}, "biases are not served"),
        ({"r": 2}, r"has the shape \[.*\], which does not fit base and rank"),
        ({"target_modules": ["q_proj"]}, "target modules of adapter_config.json are not those of"),
        ({"target_modules": ["none"]}, "target modules of adapter_config.json are not those of"),
        ({"target_modules": "("}, "names no target modules"),
        ({"lora_alpha": float("nan")}, "lora_alpha is no number from 0 to 100 times"),
        ({"lora_alpha": 1e6}, "lora_alpha is no number from 0 to 100 times"),
        ({"lora_alpha": "16"}, "lora_alpha is no number from 0 to 100 times"),
        ({"fan_in_fan_out": True}, r"has the shape \[.*\], which does not fit base and rank"),
    ],
)
def test_adapters_of_other_kinds(
    good: Path, shapes: Shapes, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(good, tmp_path / "changed")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        check_adapter(folder, shapes, 8)


def test_adapters_of_another_base(good: Path, gpt2: Path, shapes: Shapes) -> None:
    with pytest.raises(AdapterError, match="is no LoRA weight of this base"):
        check_adapter(good, base_shapes(gpt2), 8)
    halved = {name: (shape[0] // 2, *shape[1:]) for name, shape in shapes.items()}
    with pytest.raises(AdapterError, match="does not fit base and rank"):
        check_adapter(good, halved, 8)


def test_transposed_bases_are_known(gpt2: Path, tmp_path: Path) -> None:
    assert check_adapter(make_adapter(tmp_path / "of_gpt2", gpt2, seed=2), base_shapes(gpt2), 8) == 4


@pytest.mark.ray
@pytest.mark.vllm
def test_adapters_come_and_go_on_a_running_server(endpoint: Endpoint) -> None:
    """Added, answering, scoring, full, removed, gone, and another one under the same name."""
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Name a fruit."}], "temperature": 0}

    def text(client: openai.OpenAI, model: str) -> str:
        reply = client.chat.completions.create(model=model, max_tokens=16, **question)
        return str(reply.choices[0].message.content)

    with endpoint.http() as http, endpoint.client() as client:
        before = {model: text(client, model) for model in ("sft", "jpo", "dpo.one")}
        made = http.post("/v1/adapters", json={"name": "new", "folder": "extra"})
        assert (made.status_code, made.json()["parent"], made.json()["warnings"]) == (201, "sft", [])
        assert "new" in {model.id for model in client.models.list()}
        first = text(client, "new")
        item = {"instruction": "Name a fruit.", "response": "A pear."}
        score = http.post("/v1/score", json={"model": "new", "items": [item]}).json()["data"][0]
        assert score["beta"] == 0.1
        assert score["score"] != 0
        assert http.post("/v1/adapters", json={"name": "new", "folder": "other"}).status_code == 409
        assert http.post("/v1/adapters", json={"name": "sft", "folder": "other"}).status_code == 409
        record_base(store_of(endpoint.run_dir) / "fourth", Path("/elsewhere"), "0123456789abcdef", load_in_4bit=True)
        odd = http.post("/v1/adapters", json={"name": "full", "folder": "fourth"})
        assert odd.status_code == 201
        assert [warning.split(" and ")[0].split(" (")[0] for warning in odd.json()["warnings"]] == [
            "full was trained on another base",
            "full was trained on a 4-bit base",
        ]
        assert http.post("/v1/adapters", json={"name": "more", "folder": "third"}).status_code == 409
        assert http.delete("/v1/adapters/full").json() == {"id": "full", "object": "model", "deleted": True}
        assert http.delete("/v1/adapters/full").status_code == 404
        assert http.delete("/v1/adapters/new").status_code == 200
        kept = [path.name for path in endpoint.run_dir.glob("serving/server-*/adapters/*")]
        assert sorted(name.rpartition("-")[0] for name in kept) == ["dpo.one", "jpo"]
        with pytest.raises(openai.NotFoundError):
            text(client, "new")
        assert http.post("/v1/score", json={"model": "new", "items": [item]}).status_code == 404
        assert http.post("/v1/adapters", json={"name": "new", "folder": "other"}).status_code == 201
        assert text(client, "new") != first
        assert {model: text(client, model) for model in before} == before
        assert http.delete("/v1/adapters/new").status_code == 200


@pytest.mark.ray
@pytest.mark.vllm
def test_what_the_run_trains_meanwhile_may_be_added(endpoint: Endpoint) -> None:
    make_adapter(endpoint.run_dir / "train" / "later", endpoint.run_dir / "sft", seed=7)
    with endpoint.http() as http:
        assert http.post("/v1/adapters", json={"name": "later", "folder": "later"}).status_code == 201
        asked = {"model": "later", "prompt": "Name a fruit.", "max_tokens": 4}
        assert http.post("/v1/completions", json=asked).status_code == 200
        assert http.delete("/v1/adapters/later").status_code == 200
    shutil.rmtree(endpoint.run_dir / "train" / "later")


@pytest.mark.ray
@pytest.mark.vllm
def test_the_largest_weights_harm_nobody(endpoint: Endpoint) -> None:
    """What is not finite stays in the engine's cache and comes out in other models' answers: weights of 1e30 turned
    theirs into nothing. With the largest that are let in, theirs are as before.
    """
    store = store_of(endpoint.run_dir)
    weights = load_file(store / "extra" / WEIGHTS)
    for name, size in (("enormous", 1e30), ("largest", LARGEST_WEIGHT)):
        folder = shutil.copytree(store / "extra", store / name)
        save_file({key: size * (1 - 2 * (weight < 0).float()) for key, weight in weights.items()}, folder / WEIGHTS)
    config = json.loads((store / "largest" / ADAPTER_CONFIG).read_text())
    config["lora_alpha"] = LARGEST_SCALE * config["r"] ** 0.5
    (store / "largest" / ADAPTER_CONFIG).write_text(json.dumps(config))
    item = {"instruction": "Name a fruit.", "response": "A pear."}
    with endpoint.http() as http:

        def answers(model: str, **more: Any) -> list[str]:
            asked = {"model": model, "prompt": "Name a fruit.", "max_tokens": 8, "temperature": 0} | more
            return [choice["text"] for choice in http.post("/v1/completions", json=asked).json()["choices"]]

        before = answers("jpo")
        assert before != [""]
        refused = http.post("/v1/adapters", json={"name": "enormous", "folder": "enormous"})
        assert (refused.status_code, "overflow" in refused.text) == (422, True)
        assert http.post("/v1/adapters", json={"name": "largest", "folder": "largest"}).status_code == 201
        for _ in range(4):
            answers("largest", temperature=1, n=4, max_tokens=32, ignore_eos=True)
        assert http.post("/v1/score", json={"model": "largest", "items": [item]}).status_code in (200, 422)
        assert [answers("jpo") for _ in range(8)] == [before] * 8
        assert http.post("/v1/score", json={"model": "jpo", "items": [item]}).status_code == 200
        assert http.delete("/v1/adapters/largest").status_code == 200


@pytest.mark.ray
@pytest.mark.vllm
def test_adapters_that_are_none_are_refused_by_a_running_server(endpoint: Endpoint) -> None:
    store = store_of(endpoint.run_dir)
    pickled = pickled_adapters(store / "extra", store / "bad")
    wrong = shutil.copytree(store / "extra", store / "bad" / "wrong_shape")
    config = json.loads((wrong / ADAPTER_CONFIG).read_text())
    (wrong / ADAPTER_CONFIG).write_text(json.dumps(config | {"r": 2}))  # the weights are of rank 4
    with endpoint.http() as http:
        for name in TRAVERSALS:
            reply = http.post("/v1/adapters", json={"name": name, "folder": "extra"})
            assert 400 <= reply.status_code < 500, (name, reply.text)
        for folder in [*TRAVERSALS, *(f"bad/{path.name}" for path in pickled), "bad/wrong_shape", "train/gone"]:
            reply = http.post("/v1/adapters", json={"name": "bad", "folder": folder})
            assert 400 <= reply.status_code < 500, (folder, reply.text)
        for name in ("..", "a/b", "%2e%2e", "..%2f..%2fetc"):
            assert http.delete(f"/v1/adapters/{name}").status_code in (401, 404, 405)
        assert {card["id"] for card in http.get("/v1/models").json()["data"]} == {"sft", "jpo", "dpo.one"}
    assert not PICKLE_RAN.exists()
