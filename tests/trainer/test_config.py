"""Settings: what wins, and what an error says."""

import subprocess
import sys

import pytest

from trainer.config import OPTIONS, ConfigError, TelemetryConfig, TrainerConfig
from trainer.parsing import parse_config


def from_file(tmp_path, text: str, *flags: str) -> tuple[TrainerConfig, TelemetryConfig]:
    path = tmp_path / "run.yml"
    path.write_text(text)
    return parse_config(["--config", str(path), *flags])


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    config, _ = from_file(
        tmp_path, "learning-rate: 1e-4\nnum_envs: 8\nanneal_learning_rate: false\ntarget_kl: null\n", "--num-envs", "16"
    )
    assert (config.learning_rate, config.num_envs, config.anneal_learning_rate) == (1e-4, 16, False)
    assert config.epochs == TrainerConfig().epochs and config.target_kl is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nnum_env: 3\n", r"run.yml:2: unknown key 'num_env'; did you mean num_envs\?"),
        ("seed: 1\nepochs: 2\nseed: 2\n", r"run.yml:3: key 'seed' is set twice, first at .*run.yml:1: seed"),
        ("num-envs: 8\nnum_envs: 8\n", r"run.yml:2: key 'num_envs' is set twice"),
        ("epochs: four\n", r"run.yml:1: epochs must be a whole number, got 'four'"),
        ("epochs: 4.0\n", r"epochs must be a whole number, got 4.0"),
        ("epochs: true\n", r"epochs must be a whole number, got True"),
        ("gamma: [0.9]\n", r"gamma must be a number"),
        ("anneal_learning_rate: 1\n", r"anneal_learning_rate must be true or false"),
        ("seed: null\n", r"seed must be a whole number, got None"),
        ("gamma: 1.5\n", r"run.yml:1: gamma: must be at most 1.0, got 1.5"),
        ("learning_rate: .nan\n", r"learning_rate: must be finite"),
        ("on_nonfinite: rise\n", r"must be one of skip, raise, got 'rise'; did you mean raise\?"),
        ("drill: dominate:op\n", r"run.yml:1: drill: expected KIND:HEAD:FIRST-LAST"),
        ("run: ''\n", r"run: must not be empty"),
        ('run: "a\\ud800"\n', r"run: must be printable text"),
        ("run: 2024-13-45\n", r"run.yml:1: run: month must be in 1..12"),
        ("gamma: " + "9" * 401 + "\n", r"run.yml:1: gamma"),
        ("seed: " + "9" * 5000 + "\n", r"run.yml:1: seed"),
        ("seed: 99999999999\n", r"run.yml:1: seed: must be at most"),
        ("run: \0\n", r"run.yml"),
        ("run: " + "[" * 3000 + "\n", r"run.yml: nested too deeply"),
        ("- seed\n", r"run.yml:1: expected `key: value` lines"),
        ("seed: 1\nenv: [\n", r"run.yml:3: "),
        ("env: !!python/object/apply:os.system ['true']\n", r"run.yml:1: could not determine a constructor"),
        (
            "warning_threshold: 1\ncritical-threshold: 1\n",
            r"run.yml:1: warning_threshold and .*run.yml:2: critical_thr",
        ),
        ("num_envs: 2\nrollout_steps: 4\n", r"run.yml:1: num_envs and .*run.yml:2: rollout_steps: a minibatch of 512"),
    ],
)
def test_an_error_names_key_and_line_and_the_nearest_valid_one(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        from_file(tmp_path, text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-env", "8"], r"did you mean --num-envs\?"),
        (["--epochs", "x"], r"--epochs: invalid int value: 'x'"),
        (["--epochs", "0"], r"--epochs: must be at least 1, got 0"),
        (["--config", "missing.yml"], r"cannot read missing.yml: No such file"),
        (["--total-timesteps", "10"], r"less than one rollout of 64 x 64 = 4096"),
        (["--drill", "explode:op:1-2"], r"unknown kind 'explode'; there are dominate, starve, nan"),
        (
            ["--warning-threshold", "2.5"],
            r"--warning-threshold and critical_threshold \(default\): the warning threshold must be below the critical "
            r"one, got 2.5 and 2.0",
        ),
        (["--warning-threshold", "0"], r"--warning-threshold: must be above 0, got 0.0"),
        (["--critical-threshold", "inf"], r"--critical-threshold: must be finite, got inf"),
        (["--critical-threshold", "high"], r"--critical-threshold: invalid float value: 'high'"),
        (["--follow", "missing.log"], r"there is no file 'missing.log'"),
    ],
)
def test_flags_are_checked_the_same_way(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(flags)


def test_an_empty_file_changes_nothing(tmp_path):
    assert from_file(tmp_path, "# nothing\n") == (TrainerConfig(), TelemetryConfig())


def test_help_shows_every_option_with_its_default():
    text = subprocess.run(
        [sys.executable, "-m", "trainer", "--help"], capture_output=True, text=True, check=True
    ).stdout
    text = " ".join(text.split())
    options = text.split(" --config FILE YAML")[1].split(" --")
    assert len(options) > len(OPTIONS)
    for name, option in OPTIONS.items():
        flag = option.metadata.get("flag", "--" + name.replace("_", "-"))[2:]
        (described,) = [part for part in options if part.split(" ")[0] == flag and "(default: " in part] or [None]
        assert described or f"--no-{flag}" in text, flag
