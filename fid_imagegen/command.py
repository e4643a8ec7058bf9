"""How every entry point runs: quiet logs, and errors as one line that says what was found, expected and to be done."""

import importlib.util
import sys
from collections.abc import Callable

from absl import app, flags, logging

EXPECTED = (ValueError, OSError, RuntimeError, ImportError)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` under absl. Expected errors end with status 1 and their message; `--verbosity=1` shows where they arose."""

    def quiet(argv):
        verbosity = flags.FLAGS["verbosity"]
        if not verbosity.present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells its life at INFO and below
        if len(argv) > 1:
            raise app.UsageError(f"found arguments {argv[1:]}, expected flags only, such as --workdir=DIR")
        try:
            main(argv)
        except EXPECTED as error:
            if verbosity.value > 0:
                raise
            sys.exit(f"error: {error}")

    app.run(quiet)


def load_config(text: str):
    """The config of FILE[:ARG]."""
    path, _, arg = text.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)
