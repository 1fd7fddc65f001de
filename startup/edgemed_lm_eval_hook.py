"""Makes `lm_eval --model edgemed` known to lm-evaluation-harness 0.4.13, the newest release, which
has no way to learn of a model from outside.

Later versions find the entry point in pyproject.toml and need none of this. edgemed_lm_eval.pth
imports this file whenever Python starts in the environment (as setuptools does with
distutils-precedence.pth), so it stays outside the package and imports nothing: it waits until
lm_eval.models is loaded, adds one name to its registry, and is gone. Removing the .pth file
switches it off.
"""

import sys


class Watcher:
    """An import hook that finds lm_eval.models as usual and has something to do after it was
    run.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            register()

        spec.loader.exec_module = run_and_register
        return spec


def register():
    from lm_eval.api.registry import model_registry

    if "edgemed" not in model_registry:
        # A name only: the adapter is imported when somebody asks for it.
        model_registry.register("edgemed", target="edgemed.evaluation.lm_eval_model:EngineLM")


sys.meta_path.insert(0, Watcher())
