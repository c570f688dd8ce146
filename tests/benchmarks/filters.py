"""Ways to write a filter bank on a CPU: ``python -m tests.benchmarks.filters``.

For each way the time of an energy, the sum of √(1 + u²) − 1 over all responses u, of its gradient in the image, and of one more
product with its Hessian, as in an adjoint solve. Medians over repeats in float32, after a check against float64.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from energynet.energies import filter_bank

from . import command

Bank = Callable[[Tensor, Tensor], Tensor]  # (B, C, H, W), (F, C, k, k) -> (B, F, H − k + 1, W − k + 1)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    return functional.conv2d(x, weight)


def channels_last(x: Tensor, weight: Tensor) -> Tensor:
    last = torch.channels_last
    return functional.conv2d(x.contiguous(memory_format=last), weight.contiguous(memory_format=last))


def unfold_and_fold(x: Tensor, weight: Tensor) -> Tensor:  # autograd's gradient of unfold is fold
    size = weight.shape[-1]
    responses = weight.flatten(1) @ functional.unfold(x, size)
    return responses.unflatten(2, (x.shape[2] - size + 1, x.shape[3] - size + 1))


def strided_windows(x: Tensor, weight: Tensor) -> Tensor:
    size = weight.shape[-1]
    windows = x.unfold(2, size, 1).unfold(3, size, 1)  # a view (B, C, H, W, k, k)
    flat = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
    return (weight.flatten(1) @ flat).unflatten(2, tuple(windows.shape[2:4]))


def shifts_at_once(x: Tensor, weight: Tensor) -> Tensor:
    size = weight.shape[-1]
    rows, columns = x.shape[2] - size + 1, x.shape[3] - size + 1
    windows = torch.cat([x[..., i : i + rows, j : j + columns] for i in range(size) for j in range(size)], 1)
    return (weight.permute(0, 2, 3, 1).flatten(1) @ windows.flatten(2)).unflatten(2, (rows, columns))


def windows_last(x: Tensor, weight: Tensor) -> Tensor:  # one row per pixel
    windows = x.unfold(2, weight.shape[-1], 1).unfold(3, weight.shape[-1], 1)
    rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
    return (rows @ weight.flatten(1).T).permute(0, 3, 1, 2)


def fourier(x: Tensor, weight: Tensor) -> Tensor:
    size, shape = weight.shape[-1], x.shape[2:]
    product = torch.einsum("bcuv,fcuv->bfuv", torch.fft.rfft2(x), torch.fft.rfft2(weight, shape).conj())
    return torch.fft.irfft2(product, shape)[..., : shape[0] - size + 1, : shape[1] - size + 1]


class _FlippedConvolution(torch.autograd.Function):
    """The gradient as one convolution with flipped filters; no vmap and no forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.conv2d(x, weight)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        around = functional.pad(cotangent, (weight.shape[-1] - 1,) * 4)
        return _FlippedConvolution.apply(around, weight.flip(2, 3).transpose(0, 1)), None


def flipped_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return _FlippedConvolution.apply(x, weight)


WAYS: dict[str, Bank] = {
    "conv2d": convolution,
    "conv2d, channels last": channels_last,
    "conv2d, gradient by flipped conv2d": flipped_convolution,
    "unfold, matmul, fold": unfold_and_fold,
    "strided windows, matmul": strided_windows,
    "windows last, matmul": windows_last,
    "shifts at once, matmul": shifts_at_once,
    "FFT": fourier,
    "energynet's filter_bank": filter_bank,
}


def energy(bank: Bank, x: Tensor, weight: Tensor) -> Tensor:
    around = functional.pad(x, (weight.shape[-1] // 2,) * 4, mode="reflect")
    responses = bank(around, weight)
    return (torch.hypot(responses, responses.new_ones(())) - 1).sum()


def gradient(bank: Bank, x: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(energy(bank, x, weight), x, create_graph=True)[0]


class Work:
    """One size of the problem."""

    def __init__(self, batch: int, pixels: int, channels: int, size: int, filters: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(filters, channels, size, size, generator=generator) / size
        self.x = torch.rand(batch, channels, pixels, pixels, generator=generator).requires_grad_()
        self.v = torch.randn(self.x.shape, generator=generator)
        exact = gradient(convolution, self.x.double(), self.weight.double())
        self.exact = exact.detach()

    def tasks(self, bank: Bank) -> list[Callable[[], Tensor]]:
        linear = gradient(bank, self.x, self.weight)
        error = float((linear.detach() - self.exact).abs().max() / self.exact.abs().max())
        assert error < 1e-4, error

        def value() -> Tensor:
            with torch.no_grad():
                return energy(bank, self.x, self.weight)

        return [
            value,
            lambda: torch.autograd.grad(energy(bank, self.x, self.weight), self.x)[0],
            lambda: torch.autograd.grad(linear, self.x, self.v, retain_graph=True)[0],
        ]


def medians(tasks: dict[str, list[Callable[[], Tensor]]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds; the ways take turns, so that a disturbance meets them all."""
    seen: dict[str, list[list[float]]] = {name: [[] for _ in row] for name, row in tasks.items()}
    for k in range(repeats + 2):
        for name, row in tasks.items():
            for task, times in zip(row, seen[name]):
                start = clock()
                task()
                if k >= 2:
                    times.append(1e3 * (clock() - start))
    return {name: [statistics.median(times) for times in row] for name, row in seen.items()}


def main() -> None:
    parser = command.parser("filters", __doc__)
    parser.add_argument("--repeats", type=command.positive, default=15)
    parser.add_argument("--threads", type=command.positive, default=1)
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    told = "processor" if options.cpu_time else "wall"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.threads} threads, ms of {told} time, medians")
    for batch, pixels in ((4, 64), (1, 256)):
        for size in (5, 7):
            work = Work(batch, pixels, options.channels, size, options.filters)
            rows = medians({name: work.tasks(bank) for name, bank in WAYS.items()}, options.repeats, clock)
            first = rows["conv2d"]
            print(f"\n{batch} × {options.channels} × {pixels} × {pixels}, {options.filters} filters {size} × {size}")
            print(f"{'':36}{'energy':>8}{'gradient':>10}{'Hessian v':>11}   gradient and product, ratio to conv2d")
            for name, (value, slope, product) in rows.items():
                ratio = (slope + product) / (first[1] + first[2])
                print(f"{name:36}{value:8.2f}{slope:10.2f}{product:11.2f}{ratio:9.2f}", flush=True)


if __name__ == "__main__":
    main()
