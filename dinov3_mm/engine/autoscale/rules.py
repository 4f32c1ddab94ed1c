"""Hyper-parameters of continued pretraining from data set, batch, run length and backbone.

Every rule is a pure function that returns the value and one line that says how it came about. Where
a number is taken from a released recipe (arXiv 2508.10104 and its configurations), the comment
names it; the rest is a judgement, with its reason.
"""

import math
from typing import Any, NamedTuple

# A prototype needs images to stand for: the ImageNet recipe has 65,536 for 1.28 M images. More
# than a batch can fill leave Sinkhorn-Knopp with near-uniform targets: the largest released ratio
# is 262,144 for a batch of 4,096.
IMAGES_PER_PROTOTYPE = 20
PROTOTYPES_PER_BATCH_IMAGE = 64
PROTOTYPES = (256, 65536)

# Learning rate of a ViT-B at batch 1024; narrower networks take more and wider ones less, down to
# the rate at which the high-resolution stage adapts the 7B (7.07e-5 at batch 2048).
LR_AT_1024 = 1e-4
LR_WIDTH = 768
LEAST_LR_AT_1024 = 5e-5

# Long enough for random heads; as long as the released configuration that adapts a ViT-L.
EPOCHS = 20
ITERATIONS = (500, 25_000)

# EMA momentum 0.994 at batch 1920: the teacher averages the students of the last 320,000 images.
TEACHER_IMAGES = 1920 / (1 - 0.994)
TEACHER_SHARE = 0.1

HEAD_START_SHARE = 0.1
HEAD_START = (100, 1000)

HELD_OUT_IMAGES = 2000
HELD_OUT_EVERY = (5, 1000)

# What may be tried for a GPU, the most first, and what a process on the CPU gets.
IMAGES_PER_PROCESS = (128, 64, 32, 16, 8)
IMAGES_PER_CPU_PROCESS = 16
LARGEST_BATCH = 1024
# Of a GPU's memory. The rest is for evaluations, for what compiled blocks keep otherwise, and for
# the reserve of the plan: nobody looks at a batch that nobody chose before the run is over.
USABLE_MEMORY = 0.75


class Derived(NamedTuple):
    """A value and where it comes from, in words."""

    value: Any
    text: str


def held_out_every(num_images: int) -> Derived:
    """One image in how many is kept for evaluation: about 2000, a fifth of small sets."""
    low, high = HELD_OUT_EVERY
    every = min(max(round(num_images / HELD_OUT_IMAGES), low), high)
    return Derived(
        every, f"evaluation on 1 image in {every}, about {num_images // every} of {num_images}"
    )


def global_batch(per_process: int, world_size: int, accumulate: int, num_images: int) -> Derived:
    """Images of an optimizer step, not more than half of the data set.

    An image that is twice in a batch is its own nearest neighbour for KoLeo.
    """
    step = world_size * accumulate
    largest = max(step, min(LARGEST_BATCH, num_images // 2) // step * step)
    batch = min(per_process * step, largest)
    micro = f" x {accumulate} micro batches" if accumulate > 1 else ""
    cut = f", cut to {batch}" if batch < per_process * step else ""
    return Derived(
        batch,
        f"global batch {batch} = {per_process} images x {world_size} process(es){micro}{cut}",
    )


def iterations(num_images: int, batch: int) -> Derived:
    """Length of the run: 20 epochs, within the limits of ``ITERATIONS``."""
    low, high = ITERATIONS
    wanted = math.ceil(EPOCHS * num_images / batch)
    value = min(max(wanted, low), high)
    limit = f", at least {low}" if wanted < low else f", at most {high}" if wanted > high else ""
    source = f"{EPOCHS} epochs x {num_images} images / batch {batch}"
    return Derived(value, f"iterations {value} = {source}{limit}")


def prototypes(num_images: int, batch: int) -> Derived:
    """Prototypes of a head: as many as the images can fill, a power of two."""
    low, high = PROTOTYPES
    from_data = num_images / IMAGES_PER_PROTOTYPE
    from_batch = PROTOTYPES_PER_BATCH_IMAGE * batch
    value = min(max(_power_of_two(min(from_data, from_batch)), low), high)
    return Derived(
        value,
        f"prototypes {value} = power of two below {num_images} images / {IMAGES_PER_PROTOTYPE} and "
        f"{PROTOTYPES_PER_BATCH_IMAGE} x batch {batch}, within {low} to {high}",
    )


def learning_rate(width: int, batch: int) -> Derived:
    """Peak learning rate: by width, and with the square root of the batch relative to 1024."""
    base = max(LR_AT_1024 * LR_WIDTH / width, LEAST_LR_AT_1024)
    value = float(f"{base * math.sqrt(batch / 1024):.3g}")
    return Derived(
        value, f"learning rate {value:.3g} = {base:.3g} (width {width}) x sqrt({batch} / 1024)"
    )


def head_start(max_iters: int) -> Derived:
    """Iterations in which only the heads learn: a tenth of the run."""
    low, high = HEAD_START
    value = min(max(round(HEAD_START_SHARE * max_iters), low), high, max_iters // 4)
    return Derived(
        value,
        f"backbone frozen for {value} iterations = {HEAD_START_SHARE:.0%} of {max_iters}, within "
        f"{low} to {high} and a quarter of the run",
    )


def backbone_warmup(freeze: int) -> Derived:
    """Iterations over which the backbone's learning rate rises: as long as it was frozen."""
    return Derived(freeze, f"backbone warm-up {freeze} iterations, as long as the freeze")


def warmup(freeze: int) -> Derived:
    """Warm-up of the learning rate: over half of the freeze, so it concerns the heads."""
    return Derived(freeze // 2, f"learning-rate warm-up {freeze // 2} iterations, half the freeze")


def teacher_momentum(batch: int, max_iters: int) -> Derived:
    """EMA momentum that averages over as many images as the released recipe, and fits the run.

    Per image it is ``0.994 ** (batch / 1920)``. A teacher that averages over more than a tenth of
    the run would never follow.
    """
    released, share = TEACHER_IMAGES / batch, TEACHER_SHARE * max_iters
    horizon = max(min(released, share), 2.0)
    value = round(1 - 1 / horizon, 6)
    return Derived(
        value,
        f"EMA momentum {value:g}: averages over {horizon:.0f} iterations, the smaller of "
        f"{released:.0f} (0.994 ** ({batch} / 1920)) and {TEACHER_SHARE:.0%} of the run",
    )


def interval(what: str, max_iters: int, parts: int, largest: int | None = None) -> Derived:
    """Iterations between two events of which a run has ``parts``, or more in long runs."""
    value = max(1, max_iters // parts)
    value = value if largest is None else min(value, largest)
    return Derived(value, f"{what} every {value} iterations")


def _power_of_two(value: float) -> int:
    """Largest power of two that is not above ``value``, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(value, 1))))
