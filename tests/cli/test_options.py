"""Options: one dataclass as flags, config file, environment and documentation."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm import cli
from anellm.config import TrainConfig
from anellm.errors import ConfigError, InvalidError
from anellm.options import dump_toml, option, option_fields, to_toml

SNAPSHOT = Path(__file__).parent / "flags.snapshot.txt"


def parse(*argv: str) -> TrainConfig:
    return cli.parse(TrainConfig, argv, "train")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANELLM_DEVICE", "ANELLM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_flags_are_as_recorded() -> None:
    """Every flag, default and limit; ANELLM_UPDATE_SNAPSHOT=1 records them anew."""
    found = cli.flag_tables()
    if os.environ.get("ANELLM_UPDATE_SNAPSHOT") == "1":
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert found == SNAPSHOT.read_text(encoding="utf-8")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.VERBS:
        module = __import__(cli.VERBS[name][0], fromlist=["VERB"])
        assert module.main(["--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: anellm {name}" in text
        for item in option_fields(module.VERB.config):
            assert item.flag in text


def sample_values(item: Any) -> list[str]:
    """Return texts that an option takes."""
    opt = item.option
    if item.name == "activation_checkpoint":
        return ["all", "boundary", "sqrt", "every:3", "none"]
    if opt.choices is not None:
        return list(opt.choices)
    if item.kind is str:
        return ["x", "-1", "a b", "ü\n"]
    least = opt.low if opt.low is not None else (opt.above or 0)
    most = opt.high if opt.high is not None else least + 10
    if item.kind is int:
        return [str(int(least)), str(int(most))]
    return [str((least + min(most, opt.below or most)) / 2)]


EXCLUSIVE = {
    "decay_steps": ["--schedule", "wsd"],
    "val_data": ["--data", "x"],
    "min_learning_rate": ["--learning-rate", "99"],
    **{
        name: ["--device", "ane-sim"]
        for name in ("chip", "numerics", "ane_scaling", "ane_softmax", "ane_fallback", "ane_mode")
    },
    "ane_qos": ["--device", "ane"],
}


@pytest.mark.parametrize("item", option_fields(TrainConfig), ids=lambda item: item.name)
def test_every_flag_and_key_works_and_is_checked(item: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    more = EXCLUSIVE.get(item.name, [])
    if item.kind is bool:
        assert getattr(parse(item.flag), item.name) is True
        assert getattr(parse(item.flag, "--no-" + item.flag[2:]), item.name) is False
        return
    for text in sample_values(item):
        config = parse(f"{item.flag}={text}", *more)
        value = getattr(config, item.name)
        assert str(value) == text or float(value) == float(text)
        if not item.option.flag_only:
            file.write_text(dump_toml({item.name: value}))
            assert parse("--config", str(file), *more) == config
    opt = item.option
    wrong = ["", "x", "1.5x", "nan", "inf", "1e999"] if item.kind is not str else []
    wrong += ["1.5"] if item.kind is int else []
    wrong += [str(opt.low - 1)] if opt.low is not None else []
    wrong += [str(opt.high * 2 + 1)] if opt.high is not None else []
    wrong += [str(opt.above)] if opt.above is not None else []
    wrong += [str(opt.below)] if opt.below is not None else []
    wrong += ["no such choice"] if opt.choices is not None or item.name == "activation_checkpoint" else []
    for text in wrong:
        with pytest.raises(ConfigError, match=item.flag):
            parse(f"{item.flag}={text}", *more)
    if not opt.flag_only:
        for toml in ("[1]", "1979-05-27", "true", *(['"x"'] if item.kind is not str else ["1"])):
            file.write_text(f"{item.name} = {toml}\n")
            with pytest.raises(ConfigError, match=rf"c\.toml: {item.name}: expected"):
                parse("--config", str(file), *more)


def test_unknown_names_bring_the_nearest(tmp_path: Path) -> None:
    for argv, message in (
        (["--bach-size", "3"], "unknown flag --bach-size; did you mean --batch-size?"),
        (["--batch_size=3"], "unknown flag --batch_size; did you mean --batch-size?"),
        (["--steps", "3", "more"], "unexpected argument 'more'"),
        (["--step", "3"], "unknown flag --step; did you mean --steps?"),
        (["--preset", "storys15m"], "found 'storys15m'; did you mean stories15m?"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(*argv)
        assert message in str(caught.value)
    file = tmp_path / "c.toml"
    for text, message in (
        ("bach_size = 3", "unknown key 'bach_size'; did you mean batch_size?"),
        ("[optimizer]\nlr = 1", "unknown key 'optimizer'"),
        ("quiet = true", "unknown key 'quiet'"),
        ("steps = ", "not a TOML file"),
        ("steps = 1\nsteps = 2", "not a TOML file"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            parse("--config", str(file))
        assert f"{file}: {message}" in str(caught.value)
    file.write_bytes(b'out = "\xff"')
    with pytest.raises(ConfigError, match="not a TOML file"):
        parse("--config", str(file))
    with pytest.raises(ConfigError, match="No such file"):
        parse("--config", str(tmp_path / "missing.toml"))


def test_options_that_exclude_each_other() -> None:
    for argv, message in (
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs exclude"),
        (["--model", "x", "--preset", "tiny"], "--model and --preset exclude"),
        (["--min-learning-rate", "1", "--learning-rate", "0.1"], "expected at most --learning-rate=0.1, found 1"),
        (["--decay-steps", "3"], "only for --schedule wsd"),
        (["--val-data", "x"], "expected --data"),
        (["--out="], "--out: expected a path"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(*argv)


def test_resume_takes_a_value_or_none() -> None:
    assert parse().resume is None
    assert parse("--resume").resume == "auto"
    assert parse("--resume", "--steps", "3").resume == "auto"
    assert parse("--resume", "runs/x").resume == "runs/x"


def test_flags_beat_the_file_and_the_file_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.toml"
    file.write_text("threads = 3\nsteps = 5\n")
    assert parse().threads == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert parse().threads == 5
    monkeypatch.setenv("ANELLM_THREADS", "4")
    assert parse().threads == 4
    config = parse("--config", str(file))
    assert (config.threads, config.steps) == (3, 5)
    config = parse("--config", str(file), "--threads", "2")
    assert (config.threads, config.steps) == (2, 5)


@pytest.mark.parametrize("text", ["x", "-1", "257", "1.5"])
def test_environment_variables_are_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ANELLM_THREADS", text)
    with pytest.raises(InvalidError, match="environment variable ANELLM_THREADS"):
        parse()
    monkeypatch.delenv("ANELLM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert parse().threads == 0  # OpenMP's variable is not ours to refuse
    monkeypatch.setenv("ANELLM_DEVICE", "cpi")
    with pytest.raises(ConfigError, match="ANELLM_DEVICE: expected one of auto, cpu, ane, ane-sim, found 'cpi'"):
        parse()


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)


@given(st.dictionaries(st.text("abcXYZ_-09", min_size=1), scalars | st.none()))
def test_toml_round_trip(values: dict[str, Any]) -> None:
    found = tomllib.loads(dump_toml(values))
    expected = {key: value for key, value in values.items() if value is not None}
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_only_scalars_and_lists_of_them_are_written() -> None:
    with pytest.raises(TypeError, match="dict"):
        dump_toml({"a": [{}]})
    assert tomllib.loads(dump_toml({"a": ("x", "y\n"), "b": ()})) == {"a": ["x", "y\n"], "b": []}
    assert dump_toml({"a": float("nan"), "b": float("-inf")}) == "a = nan\nb = -inf\n"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 2**53),
            "data": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            "learning_rate": st.floats(0, 1e6),
            "sample_prompt": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            "seed": st.integers(0, 2**53),
        },
    )
)
def test_a_config_is_the_file_it_writes(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    file = tmp_path_factory.getbasetemp() / "round.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert parse("--config", str(file)) == config


def test_a_dataclass_is_checked_like_a_file() -> None:
    for values in ({"steps": 1.5}, {"steps": 0}, {"seed": True}, {"schedule": "x"}, {"out": 3}, {"plain": 1}):
        with pytest.raises(ConfigError, match=f"^{next(iter(values))}: expected"):
            TrainConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]


def test_an_option_is_a_scalar() -> None:
    wrong = dataclasses.make_dataclass("Wrong", [("sizes", list[int], option(None, "no flag can carry a list"))])
    with pytest.raises(TypeError, match="Wrong.sizes"):
        option_fields(wrong)
