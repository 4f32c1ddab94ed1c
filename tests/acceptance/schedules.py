"""The learning rate of every shipped downstream schedule at half, once and twice its length.

``python -m tests.acceptance.schedules`` prints, for each schedule and length that occurs, the rate
as a share of its base at 0, 10, 25, 50, 75, 90 and 100 % of the run.
"""

import copy
from pathlib import Path

from tests.downstream.schedules import downstream_configs, length_of, rates

PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    """Print the table."""
    print(f"{'first config':44s} {'length':>16s}  " + " ".join(f"{p:>7.0%}" for p in PLACES))
    for cfg in downstream_configs().values():
        for factor in (0.5, 1, 2):
            changed = copy.deepcopy(cfg)
            key, length = length_of(cfg)
            changed.train_cfg[key] = max(round(length * factor), 1)
            course = rates(changed)
            shown = [course[round(place * (len(course) - 1))] for place in PLACES]
            row = " ".join(f"{rate:7.4f}" for rate in shown)
            unit = f"{changed.train_cfg[key]} {key.removeprefix('max_')}"
            print(f"{Path(cfg.filename).stem:44s} {unit:>16s}  {row}")


if __name__ == "__main__":
    main()
