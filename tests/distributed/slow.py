"""Run a script with slow steps and slow saving, so that a test can meet it in the middle of either.

slow.py SECONDS_A_STEP SECONDS_A_SAVE SCRIPT OPTIONS...
"""

import runpy
import sys
import time

from shared.runtime.launch import quiet_libraries


def delayed(method, seconds: float):
    def call(*arguments, **options):
        time.sleep(seconds)
        return method(*arguments, **options)

    return call


if __name__ == "__main__":
    quiet_libraries()
    from transformers import Trainer

    Trainer.training_step = delayed(Trainer.training_step, float(sys.argv[1]))
    # between the weights and the rest of a checkpoint
    Trainer._save_optimizer_and_scheduler = delayed(Trainer._save_optimizer_and_scheduler, float(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
