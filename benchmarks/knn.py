"""In-training k-NN shared by ranks, against every rank judging every image by itself.

    python benchmarks/knn.py [--ranks 2] [--references 10000] [--queries 2000] [--dims 1024]
        [--pairs 15] [--out results.json]

Both get gathered features. 'each' is what the evaluation hooks did before: every rank copies them
to the host and classifies all queries there. 'shared' is what they do now: every rank classifies
its part where the features are, and counts are added up. Gloo processes of one thread each on a
CPU; with GPUs one process on each of them under NCCL. Printed are median milliseconds until the
last rank is done, the median of the ratios of alternated pairs, and the operations of a rank. The
accuracies of both must be equal (on a GPU within 0.1 %).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forward_cells import hardware
from torch import Tensor

from dinov3_mm.evaluation.knn import knn_classify

KS, NUM_CLASSES = (10, 20), 100


def make_features(count: int, dims: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy class centres (count, dims) and their labels, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, dims, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return (centres[labels] + 6 * torch.randn(count, dims, generator=generator)).to(device), labels


def seconds(work: Callable[[], dict], device: str) -> tuple[float, dict]:
    """Time from a common start until all ranks are done."""
    dist.barrier()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start, result


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One rank: alternate both ways."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=args.ranks)
    bank, labels = make_features(args.references, args.dims, 1, device)
    queries, truth = make_features(args.queries, args.dims, 2, device)

    def each() -> dict:
        return knn_classify(bank.cpu(), labels, queries.cpu(), truth, KS, num_classes=NUM_CLASSES)

    def shared() -> dict:
        options = {"num_classes": NUM_CLASSES, "shared": True}
        return knn_classify(bank, labels, queries, truth, KS, **options)

    pairs = []
    for number in range(args.pairs + 1):
        slow, expected = seconds(each, device)
        fast, actual = seconds(shared, device)
        for k, score in actual.items():  # another device may break near ties otherwise
            assert abs(score.top1 - expected[k].top1) <= (0.1 if device == "cuda" else 0), k
        if number:  # the first pair allocates
            pairs.append((slow, fast))
    if rank == 0:
        top1 = {k: score.top1 for k, score in actual.items()}
        Path(folder, "pairs.json").write_text(json.dumps({"pairs": pairs, "top1": top1}))
    dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--dims", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (args, folder), nprocs=args.ranks, start_method="spawn")
        measured = json.loads(Path(folder, "pairs.json").read_text())
    each, shared = (1e3 * statistics.median(times) for times in zip(*measured["pairs"]))
    products = 2 * args.queries * args.references * args.dims
    figures = {
        "each_ms": each,
        "shared_ms": shared,
        "speed_up": statistics.median(slow / fast for slow, fast in measured["pairs"]),
        "gflop_of_a_rank_each": products / 1e9,
        "gflop_of_a_rank_shared": products / args.ranks / 1e9,
    }
    for key, value in figures.items():
        print(f"{key:>24}: {value:.2f}")
    if args.out:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = vars(args) | {"out": None}
        record = {"figures": figures, "top1": measured["top1"], "options": options}
        args.out.write_text(json.dumps({**record, **hardware(device)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
