import pytest
import safetensors.numpy
from small_public import (
    CLASSES,
    FLOAT32,
    JSON,
    MODELS,
    SMALL_TOWERS,
    WEIGHTS,
    WHERE,
    converted,
    random_like,
    shapes_of,
    sources,
    tower_json,
    tower_tensors,
    write_json,
    write_tokenizer,
)

from fid_imagegen.models.text.clip import TOWERS


@pytest.fixture(scope="session")
def tensors():
    return {part: random_like(shapes_of(part), seed) for seed, part in enumerate(MODELS)}


@pytest.fixture(scope="session")
def public(tmp_path_factory, tensors):
    """ROOT/{decoder,prior}, laid out as the two repositories; ROOT/config.py."""
    root = tmp_path_factory.mktemp("public")
    for part, where in WHERE.items():
        write_json(root / where / "config.json", JSON[part] | {"_class_name": CLASSES[part]})
        safetensors.numpy.save_file(tensors[part], root / where / WEIGHTS)
    for repository, tower in (("decoder", "H"), ("prior", "bigG")):
        folder = root / repository / "text_encoder"
        write_json(folder / "config.json", tower_json(tower))
        safetensors.numpy.save_file(tower_tensors(tower, 7), folder / "model.safetensors")
        write_tokenizer(root / repository / "tokenizer")
    (root / "config.py").write_text(FLOAT32, "utf-8")
    return root


@pytest.fixture(scope="session")
def out(public, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("converted") / "model", *sources(public))


@pytest.fixture
def towers(monkeypatch):
    for name, tower in SMALL_TOWERS.items():
        monkeypatch.setitem(TOWERS, name, tower)
