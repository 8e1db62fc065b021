"""Values that no option can use: huge, infinite and negative numbers, texts that are no names, odd devices and models.

Every option of every script is tried, so that a new one without a bound fails here.
"""

import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from driver import backbones, cli, exits, export, knn, linear, report, segment_video, train, verify_resume
from driver.config import Config, Model, UserError
from driver.data.random_keys import seed_of
from driver.distributed import World

HERE = Path("here")
SCRIPTS = {
    "pretrain": Config(),
    "knn": knn.Options(),
    "linear": linear.Options(),
    "export": export.Export(HERE),
    "report": report.Report(HERE),
    "segment_video": segment_video.Options(HERE),
    "verify_resume": verify_resume.Verify(),
}
WHOLE = [10**30, -(10**30), 2**64, -(2**63) - 1]
NUMBERS = [math.inf, -math.inf, math.nan, 1e308, -1e308]
TEXTS = ["a\0b", "a\ud800b"]


def options(of: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Names and type of each option in a dataclass and its parts."""
    for name, kind in get_type_hints(type(of)).items():
        value = getattr(of, name)
        if dataclasses.is_dataclass(value):
            yield from options(value, (*names, name))
        else:
            yield (*names, name), kind


def with_value(of: Any, names: tuple[str, ...], value: Any) -> Any:
    first, *rest = names
    return dataclasses.replace(of, **{first: with_value(getattr(of, first), tuple(rest), value) if rest else value})


def hostile_values(kind: Any) -> list[Any]:
    """Values that an option of this type must refuse. Choices and truth values are refused by tyro."""
    kinds = get_args(kind) or (kind,)
    if tuple[float, float] in (kind, *kinds):
        return [(0.5, value) for value in NUMBERS]
    if kind in (tuple[int, ...], tuple[float, ...]):
        return [(value,) for value in (WHOLE if int in kinds else NUMBERS)]
    return (
        WHOLE * (int in kinds)
        + NUMBERS * (float in kinds)
        + [of(text) for of in (str, Path) if of in kinds for text in TEXTS]
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_and_text_of_a_script_has_a_bound(script):
    accepted = []
    for names, kind in options(SCRIPTS[script]):
        for value in hostile_values(kind):
            try:
                cli.check_bounds(with_value(SCRIPTS[script], names, value))
                accepted.append((".".join(names), value))
            except UserError as error:
                option = "--" + ".".join(names).replace("_", "-")
                assert str(error).startswith(f"{option} must ") and len(str(error)) < 300
    assert accepted == []


def test_the_walk_tries_options_of_every_kind():
    tried = {".".join(names): hostile_values(kind) for names, kind in options(Config())}
    assert len(tried) > 70 and {len(tried[name]) for name in ("run.seed", "optim.epochs")} == {len(WHOLE)}
    for name in ("optim.lr", "loss.epsilon_end", "data.local_scale", "data.pixel_range"):
        assert len(tried[name]) == len(NUMBERS)
    for name in ("run.name", "run.wandb", "run.resume", "config", "recipe"):
        assert len(tried[name]) == len(TEXTS)
    assert tried["data.exif"] == tried["loss.backend"] == []
    assert {name: kind for name, kind in options(linear.Options())}[("lr",)] == tuple[float, ...]


@pytest.mark.parametrize(
    "script, args",
    [
        ("knn", ["--temperature=nan"]),
        ("linear", ["--seed=-1"]),
        ("segment_video", ["--davis=here", "--short-side=100000000"]),
        ("report", ["a\0b"]),
        ("export", ["a\0b"]),
        ("pretrain", ["--run.seed=18446744073709551616"]),
    ],
)
def test_every_script_checks_its_bounds(script, args, capsys):
    """Each script is started as its command starts it. test_driver_checkpoints.py tries verify_resume."""
    module = importlib.import_module(f"driver.{script}")
    if script in ("pretrain", "export"):
        code = module.main(args)
    else:
        code = cli.run_script(type(SCRIPTS[script]), module.main, args)
    said = capsys.readouterr().err
    assert code == 1 and re.search(r"error: --[a-z.-]+ must ", said) and "Traceback" not in said


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_first_and_the_last_seed_can_be_used(seed):
    cli.check_bounds(with_value(Config(), ("run", "seed"), seed))
    torch.manual_seed(seed)
    torch.Generator().manual_seed(seed_of(seed, 1))


@pytest.mark.parametrize(
    "device",
    ["meta", "hpu", "xla", "privateuseone", "cpu:-1", "cpu,cuda", "", "x" * 9000, "é\n", "cpu:99999999999999999999"],
)
def test_a_device_that_computes_nothing_is_refused(device):
    with pytest.raises(UserError, match=r"^--run\.device ") as raised:
        World().choose_device(device)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp", "timm:resnet18", "resnet18.a:b", "resnet18.hf-hub:a/b"),
        *("http://a/b", "../../etc/passwd", "resnet18.no_such_tag", "resnet18\n", "", "*", "[", "a*" * 300, "x" * 9000),
    ],
)
def test_a_model_is_a_name_of_timm_alone(name, pretrained, monkeypatch):
    """No name reaches a hub or a folder, from where weights and settings of a stranger would come."""
    hub = pytest.importorskip("timm.models._hub")

    def reached(*_, **__) -> None:
        raise AssertionError("a hub was asked")

    for function in ("load_model_config_from_hf", "load_model_config_from_path", "download_cached_file"):
        monkeypatch.setattr(hub, function, reached)
        monkeypatch.setattr(sys.modules["timm.models._factory"], function, reached, raising=False)
    with pytest.raises(UserError, match=r"^--model\.") as raised:
        backbones.make(Model(name=name, pretrained=pretrained), 3, 32)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError(
            "[enforce fail at x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: 309237645312 bytes"
        ),
    ],
)
def test_too_little_memory_is_said_without_a_traceback(error, capsys):
    def run(_: World) -> int:
        raise error

    assert exits.exit_code(run) == 1
    said = capsys.readouterr().err.strip()
    assert re.match(r"error: not enough memory( \((CUDA|Default)|;)", said) and said.endswith("network take less")
    assert "\n" not in said and str(error).rpartition("err == 0. ")[2].partition("\n")[0] in said


def test_a_network_beyond_all_memory(monkeypatch):
    """The allocator of torch stands in, which on some machines would try."""

    def full(*_, **__) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(RuntimeError) as raised:
        train.pretrain(cli.parse(["--model.width=65536"]))
    assert exits.out_of_memory(raised.value) is not None and exits.out_of_memory(RuntimeError("else")) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ("--data.size '8", "--options --data.size '8: No closing quotation"),
        ("--optim.epochs=0", "exit codes {1}\n\nerror: --optim.epochs must be from 1 to"),
    ],
)
def test_verify_resume_says_what_its_run_says(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        verify_resume.verify(verify_resume.Verify(options))
