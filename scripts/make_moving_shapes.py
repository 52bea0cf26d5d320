"""Write the built-in video data `builtin/moving-shapes` as a folder of mp4 files that `--dataset_name FOLDER` takes.

    python scripts/make_moving_shapes.py FOLDER             # 1,000 clips to train on, 100 held out
    python scripts/make_moving_shapes.py FOLDER --seed 1    # other clips

`FOLDER/train` and `FOLDER/test` each hold the clips and a `metadata.jsonl`, a line for each question:

    {"videos": ["0000.mp4"], "messages": [{"role": "user", "content": "Which way does the square move?"},
     {"role": "assistant", "content": "left"}], "kind": "direction"}

Your own videos are given in the same form.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shared.builtin import moving_shapes
from shared.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist, or be empty")
    parser.add_argument("--seed", type=int, default=0, help="draws the clips (default: 0, those of the built-in data)")
    given = parser.parse_args()
    try:
        if given.folder.exists() and any(given.folder.iterdir()):
            raise UserError(f"{given.folder} is not empty: give a new folder.")
        moving_shapes.write(given.folder, given.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, clips in moving_shapes.CLIPS.items():
        print(f"{given.folder / split}: {clips:,} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
