"""From a config to what Ray Serve and vLLM are told."""

from pathlib import Path

import pytest

from jpo_ray.config_serve import ServeConfig
from jpo_ray.errors import InputError
from jpo_ray.serving.plan import EnginePlan, Plan, begun, engine_environment, engine_options, make_plan, server_folder
from serving.served_run import RANKS, make_run

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("planned") / "run", base=llama)


def planned(run: Path, **given: object) -> tuple[Plan, ServeConfig]:
    config = ServeConfig.model_validate({"run_dir": str(run), **given})
    return make_plan(config, keys_required=False), config


def test_one_engine_holds_the_base_and_a_slot_more_than_there_are_adapters(run: Path) -> None:
    plan, config = planned(run, max_adapters=3, max_num_seqs=7)
    assert [(engine.name, engine.takes_adapters) for engine in plan.engines] == [("sft", True)]
    options = engine_options(plan, config, plan.engines[0])
    assert (options["max_loras"], options["max_cpu_loras"]) == (4, 4)  # rows of the base are wrong with a full set
    assert options["max_lora_rank"] == 8 == max(RANKS.values())
    assert (options["dtype"], options["max_num_seqs"], options["tokenizer"]) == ("float32", 7, str(run / "sft"))
    assert engine_environment(config, 2)["OMP_NUM_THREADS"] == "2"


def test_nothing_is_written_before_the_server_begins(run: Path, tmp_path: Path) -> None:
    plan, _ = planned(run, state_dir=str(tmp_path / "state"))
    assert [entry.folder for entry in plan.adapters] == [str(run / "train" / name) for name in ("dpo.one", "jpo")]
    assert list(tmp_path.iterdir()) == []
    with server_folder(plan) as folder:
        assert [path.name for path in folder.iterdir()] == [".running"]
        served = begun(plan, folder)
        assert (served.state_dir, folder.parent) == (str(folder), tmp_path / "state")
        assert all(Path(entry.folder).is_relative_to(folder) for entry in served.adapters)
        assert [(entry.name, entry.beta) for entry in served.adapters] == [("dpo.one", 0.2), ("jpo", 0.5)]
        assert served.store(0.1).listed() == {entry.name: entry for entry in served.adapters}
    assert not folder.exists()


def test_folders_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plan, _ = planned(run, state_dir=str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"state_dir .*: cannot be written"), server_folder(plan):
        pass


def test_the_rank_is_one_that_vllm_has(run: Path) -> None:
    for asked, given in ((1, 8), (9, 16), (16, 16), (100, 128)):
        plan, config = planned(run, max_lora_rank=asked)
        assert engine_options(plan, config, plan.engines[0])["max_lora_rank"] == given


def test_whole_models_have_engines_of_their_own(run: Path, llama: Path) -> None:
    plan, config = planned(run, whole_models={"merged": str(llama)}, scoring={"beta": 0.7})
    assert plan.engines[1] == EnginePlan("merged", str(llama.resolve()), 0.7, takes_adapters=False)
    assert "enable_lora" not in engine_options(plan, config, plan.engines[1])


def test_replicas_and_what_they_take(run: Path) -> None:
    from jpo_ray.serving.replicas import bundles, serve_options

    plan, config = planned(run, replicas=2, cpus_per_replica=3, scoring={"cpus_per_replica": 1})
    assert bundles(plan, config) == [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}]
    options = serve_options(config)
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options
    gpu = config.model_copy(update={"gpus_per_replica": 1.0, "tensor_parallel_size": 2, "scoring": None})
    assert bundles(plan, gpu) == [{"CPU": 3.0, "GPU": 1.0}] * 4


def test_autoscaling(run: Path) -> None:
    from jpo_ray.serving.replicas import serve_options

    _, config = planned(run, max_replicas=4, target_requests=5, limits={"max_requests": 10, "retry_after_s": 3})
    options = serve_options(config)
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 5}
    assert "num_replicas" not in options
    assert options["max_queued_requests"] == 160
    assert options["backpressure_config"] == {"status_code": 429, "retry_after_s": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_model_len": 10_000_000}, "max_model_len: 10000000, and the model takes"),
        ({"max_adapters": 1}, "2 adapters, and max_adapters is 1; raise it"),
        ({"max_lora_rank": 4000}, "max_lora_rank: 4000, and vLLM serves at most"),
    ],
)
def test_plans_that_are_none(run: Path, given: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(run, **given)
