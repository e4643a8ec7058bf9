"""A text encoder that starts from another run keeps the tokenizer of that run."""

import shutil

import pytest

from configs import wuerstchen
from fid_imagegen.data.tokenizer import load_tokenizer
from fid_imagegen.training.loop import Run


@pytest.fixture
def config(random_stages, tmp_path, devices):
    """Stage C in tmp_path/next, which goes on from one trained on other captions in tmp_path/stage_c."""
    devices(1)
    for stage in ("stage_b", "stage_c"):
        shutil.copytree(random_stages / stage, tmp_path / stage)
    made = wuerstchen.get_config("runlocal").stage_c
    with made.unlocked():
        made.init.update({"stage_c": "../stage_c", "text": "../stage_c"})
    return made


def test_it_is_that_run_s(config, tmp_path):
    theirs = (tmp_path / "stage_c" / "tokenizer.json").read_text()
    run = Run(config, tmp_path / "next")
    assert run.tokenizer.json() == theirs
    with config.unlocked():
        config.init.text = ""
    assert Run(config, tmp_path / "anew").tokenizer.json() != theirs


def test_the_run_s_own_comes_first(config, tmp_path):
    own = tmp_path / "next" / "tokenizer.json"
    own.parent.mkdir()
    own.write_text(load_tokenizer(tmp_path / "stage_c" / "tokenizer.json").json())
    (tmp_path / "stage_c" / "tokenizer.json").write_text("none")
    assert Run(config, tmp_path / "next").tokenizer(["a red star"])[0].shape == (1, 16)


def test_one_that_is_lost_is_named(config, tmp_path):
    (tmp_path / "stage_c" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no .*stage_c/tokenizer.json, .*; change config.init.text"):
        Run(config, tmp_path / "next")
