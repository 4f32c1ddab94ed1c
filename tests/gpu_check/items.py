"""What ``tools/gpu_check.sh`` runs: the items in order of value, what each proves, and its time.

Plain Python without imports of torch, so that the list can be read on any machine.
"""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Item:
    """One row of the check.

    Attributes:
        module: of ``tests.gpu_check``.
        proves: in a few words.
        estimate: seconds on an H200 with 16 cores.
        derivation: where the estimate comes from.
        budget: seconds after which the item is stopped.
        alone: nothing else runs meanwhile: it measures time, or nearly fills the memory.
        needs_cuda: cannot run on a CPU, not even small.
        uses: optional packages, without which parts of it or all of it are skipped.
    """

    module: str
    proves: str
    estimate: int
    derivation: str
    budget: int
    alone: bool = False
    needs_cuda: bool = False
    uses: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Optional packages that are not installed in this interpreter."""
        return [name for name in self.uses if find_spec(name) is None]


# A process costs about 8 s before its first kernel: imports and the CUDA context. Torch's inductor
# needs 10 to 20 s for the forward and backward pass of a block with an empty cache, on cores that
# others use too. Work in between is that of an H200: 700 TFLOP/s of bf16 products at best and 40 %
# of it in a training step, 50 TFLOP/s in fp32 without TF32, 4 TB/s. 16 cores.
ITEMS: dict[str, Item] = {
    "fsdp2-resume": Item(
        "training",
        "FSDP2 wraps, steps, saves shards and resumes after SIGKILL on the GPU, in a first stage "
        "and in a Gram stage from it: losses of the run that was left alone",
        90,
        "six runs of 8 to 12 steps of a 0.9 M model, 15 s of start and 0.1 s a step each, two at a "
        "time where one does not wait for another: four in a row, and the item's own start",
        150,
    ),
    "parity-fp32": Item(
        "parity",
        "reference vectors of backbones and of a whole training step, and forward and backward "
        "passes of ViT, ConvNeXt and DINOv2 against the CPU, in fp32 without TF32",
        30,
        "start 8 s; 20 vectors of toys, 0.5 s each; three networks of 22 to 29 M parameters on 4 "
        "images, 0.1 TFLOP, built twice and run on the CPU: 3 s each",
        90,
    ),
    "compile": Item(
        "blocks",
        "compiled blocks and losses give the values and gradients of eager ones, in fp32 and bf16, "
        "without graph breaks",
        70,
        "start 8 s; inductor for a block of student (forward, backward) and teacher in two dtypes: "
        "4 graphs, 15 s each; 16 steps of a toy, 0.1 s each",
        140,
    ),
    "recompute": Item(
        "blocks",
        "with_cp=False, 'selective' and True, eager and compiled: equal gradients; bytes kept "
        "between the passes and peak of a step; compiled keeps what eager does",
        80,
        "start 8 s; six models of 170 M parameters (ViT-B twice), built and moved in 2 s each; "
        "inductor for 3 modes, 15 s each; 30 steps of 16 images (5.5 TFLOP), 0.05 s each",
        160,
    ),
    "cuda-graphs": Item(
        "blocks",
        "blocks replayed as CUDA graphs give the losses of eager ones over steps; milliseconds of "
        "a step that launches dominate, eager, compiled and replayed",
        60,
        "start 8 s; inductor twice (compiled; static shapes), 20 s each; 90 steps of 64 images of "
        "a toy, 0.05 s each",
        120,
        needs_cuda=True,
    ),
    "parity-float8": Item(
        "parity",
        "float8 products and their gradients, eager and compiled, against the products of the "
        "rounded operands, at widths of a ViT-L; the reference vectors; a ViT-S in float8",
        50,
        "start 8 s; inductor for 3 shapes and the vectors, forward and backward: 8 small graphs, 4 "
        "s each; 6 products of 6 GFLOP and their double precision on the GPU",
        120,
    ),
    "parity-bf16": Item(
        "parity",
        "bf16 autocast on the GPU is as near to fp32 as on the CPU, for ViT, ConvNeXt and DINOv2; "
        "losses of the reference step",
        30,
        "start 8 s; nine passes of 22 to 29 M parameters on 4 images, six of them on the CPU: 2 s "
        "each",
        90,
    ),
    "train-step": Item(
        "training",
        "losses and gradients of the quickstart's model over four optimizer steps: those of the "
        "CPU",
        20,
        "start 8 s; 10 steps of 8 images of a 0.9 M model, half of them on the CPU: 0.5 s each",
        60,
    ),
    "onnx-cuda": Item(
        "deployed",
        "an exported ViT-S computes under ONNX Runtime on CUDA what PyTorch does; images per "
        "second",
        45,
        "start 8 s, and again for the export, 15 s for tracing; 7 x 64 images of 224 px each way, "
        "0.6 TFLOP of fp32: 0.1 s each",
        100,
        uses=("onnx", "onnxscript", "onnxruntime"),
    ),
    "downstream": Item(
        "deployed",
        "linear heads of classification and segmentation and Mask2Former over an adapter take a "
        "step in bf16 autocast: finite losses, the frozen backbone stays",
        30,
        "start 8 s and 15 s for importing the hosts; three steps of toys",
        75,
        uses=("mmcv", "mmpretrain", "mmseg", "mmdet"),
    ),
    "recipe-step": Item(
        "speed",
        "images per second, share of the peak and memory of a step of the ViT-L recipe: eager, "
        "compiled, float8, selective recomputation",
        150,
        "per image 690 student tokens (70 % kept by stochastic depth) x 303 M x 6, 394 teacher "
        "tokens x 303 M x 2, 70 head rows x 24 M x 8: 1.1 TFLOP, so 64 images 74 TFLOP or 0.25 s; "
        "17 steps a variant 5 s, start, 0.7 G parameters and 128 images 18 s, inductor 20 s; 23 + "
        "3 x 43 s",
        210,
        alone=True,
    ),
    "attention-backends": Item(
        "blocks",
        "every attention backend on packed crops against each sequence alone in fp32, compiled or "
        "not; its time at the recipe's shapes, and which one 'auto' should choose",
        50,
        "start 8 s; inductor for the layer in 2 dtypes and at the recipe's shapes, 7 graphs, 4 s "
        "each; 22 x 44,000 tokens x 4.2 M x 6: 1.2 TFLOP, 5 ms each",
        110,
        alone=True,
        uses=("xformers",),
    ),
    "memory-vs-plan": Item(
        "speed",
        "peak memory of a step within 10 % of tools/plan.py and of the dry run: ViT-B plain and "
        "with selective recomputation, ViT-L with 65,536 prototypes",
        50,
        "start 8 s; three fake steps on the CPU of 5 to 10 s, three models of 0.2 to 0.8 G "
        "parameters in 3 to 6 s each, two steps each",
        110,
        alone=True,
    ),
    "extraction": Item(
        "speed",
        "images per second from JPEGs to tokens with a ViT-S, in bf16 and fp32, beside "
        "transformers and timm",
        50,
        "start 12 s, twice; 2 + 3 x 256 JPEGs, decoded by 16 cores at 1500 a second, transformers' "
        "processor at 300 a second: 6 s a dtype; 256 x 9.2 GFLOP are 2 TFLOP",
        110,
        alone=True,
        uses=("transformers", "timm"),
    ),
    "knn": Item(
        "speed",
        "votes of the reference vectors; neighbours among 1.28 M features as on the CPU; seconds "
        "for the queries of ImageNet",
        30,
        "start 8 s; 32 queries of a quarter on the CPU 21 GFLOP, 4,096 on the GPU 10.7 TFLOP of "
        "fp32 without TF32 and 21 GB of similarities, three times: 1 s; 1.3 GB to the CPU 2 s",
        75,
        alone=True,
    ),
}


def fits_of(names: list[str], jobs: int) -> float:
    """Seconds that items take together on an H200."""
    alone = sum(ITEMS[name].estimate for name in names if ITEMS[name].alone)
    lanes = [0.0] * jobs
    for name in names:
        if not ITEMS[name].alone:
            lanes[lanes.index(min(lanes))] += ITEMS[name].estimate
    return alone + max(lanes)
