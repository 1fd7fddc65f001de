"""The verb that runs lm-evaluation-harness with engines known to it as a model.

lm_eval 0.4.13 has no way to learn of a model from outside, so this verb adds one name to its
registry and hands over. Later versions find the entry point in pyproject.toml as well.
"""

from __future__ import annotations

import sys

import typer

from edgemed.errors import need

MODEL = "edgemed"
ADAPTER = "edgemed.evaluation.lm_eval_model:EngineLM"
# Options that are not known here belong to lm_eval. Whatever follows its first word does too, so
# that `edgemed lm-eval run --help` shows lm_eval's own help.
HANDED_OVER = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on an engine: every argument goes to lm_eval as it is.

    For example: edgemed lm-eval --model edgemed --model_args engine=DIR --tasks pubmedqa. The help
    of lm_eval itself: edgemed lm-eval -h.
    """
    # The adapter's name is enough: lm_eval imports it when somebody asks for the model.
    registry = need("lm_eval.api.registry", "lm-eval").model_registry
    command = need("lm_eval.__main__", "lm-eval")
    if MODEL not in registry:
        registry.register(MODEL, target=ADAPTER)
    process_arguments = sys.argv
    # lm_eval reads the arguments of the process.
    sys.argv = ["lm_eval", *context.args]
    try:
        command.cli_evaluate()
    finally:
        sys.argv = process_arguments
