"""python -m fid_imagegen.export --workdir DIR --out DIR

Writes a shareable folder: `config.json`, `model.safetensors` (the evaluation EMA) and a model card, `README.md`.
`ImageFunctionPipeline.from_pretrained(OUT)` loads it.
"""

from pathlib import Path

from absl import flags

from fid_imagegen import command

WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a run", required=True)
OUT = flags.DEFINE_string("out", None, "the folder to make; must not exist", required=True)

CARD = """---
library_name: fid_imagegen
tags: [image-generation, consistency-model, implicit-neural-representation, jax]
---
# {name}

A one-step generator of image functions: one network evaluation turns noise into a function that renders at any size.

```python
from fid_imagegen import ImageFunctionPipeline

functions = ImageFunctionPipeline.from_pretrained("{name}").generate(num=16, seed=0)
images = functions.render(height=512, width=768)
```

| | |
|---|---|
| parameters | {parameters:,} |
| trained on | `{source}` {path}, {size}x{size}, {channels} channels |
| objective | `{objective}`, preconditioning `{preconditioning}`, distance `{distance}` |
| steps x batch | {steps:,} x {batch} |
| weights | evaluation EMA, decay {ema} |

Detail beyond the training size is the function's interpolation. Licence of the weights: to be stated by whoever shares them;
mind the terms of the training data. Quality: see `evaluation.jsonl` of the run; no number is claimed here.
"""


def export(workdir: str, out: str) -> Path:
    """Writes the folder `out`, whole or not at all."""
    import jax

    from fid_imagegen.pipelines import ImageFunctionPipeline
    from fid_imagegen.training.runs import whole_folder, write_params

    target, pipe = Path(out), ImageFunctionPipeline.from_pretrained(workdir)
    # What an objective trains beside the generator makes no image.
    config, params = pipe.config, {"generator": pipe.params["generator"]}
    card = CARD.format(
        name=target.name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        source=config.data.source,
        path=Path(config.data.path).name,
        size=config.data.image_size,
        channels=config.data.channels,
        objective=config.objective.name,
        preconditioning=config.preconditioning,
        distance=config.distance,
        steps=config.num_steps,
        batch=config.batch_size,
        ema=config.ema_decays[-1] if config.ema_decays else "none",
    )
    with whole_folder(target) as folder:
        write_params(folder, config, params)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def main(argv):
    del argv
    print(f"exported: {export(WORKDIR.value, OUT.value)}")


if __name__ == "__main__":
    command.run(main)
