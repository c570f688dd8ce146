"""What is done to the text that Inductor writes."""

import logging
import re

import pytest
import torch
from compiling import compiles
from torch import Tensor
from torch._inductor.utils import fresh_cache

import energynet.compiled.inductor
from energynet import (
    Compiled,
    Driver,
    Eager,
    Picard,
    minimize,
)
from energynet.compiled.cpu_loops import in_place
from energynet.compiled.fold import folded
from energynet.compiled.gemm import by_onednn
from energynet.compiled.inductor import rewriting, rewritten

LOOP = """
    AtenTensorHandle buf1_handle;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(arg0_1, &buf1_handle));
    RAIIAtenTensorHandle buf1(buf1_handle);
    while (1) {
        AtenTensorHandle body_arg0_handle;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(buf1, &body_arg0_handle));
        RAIIAtenTensorHandle body_arg0(body_arg0_handle);
        static constexpr int64_t int_array_0[] = {3L, };
        AtenTensorHandle body_buf0_handle;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, int_array_0, int_array_0, f64, cpu, 0, &body_buf0_handle));
        RAIIAtenTensorHandle body_buf0(body_buf0_handle);
        kernel((double*)(body_arg0.data_ptr()), (double*)(body_buf0.data_ptr()));
        body_arg0.reset();
        buf1.reset();
        buf1 = std::move(body_buf0);
    }"""


def test_an_in_place_loop_allocates_once_and_keeps_its_input() -> None:
    code = in_place(LOOP)
    before, _, turn = code.partition("while (1) {")
    assert before.count("aoti_torch_empty_strided") == 2 and "aoti_torch_copy_(buf1, arg0_1, 0)" in before
    assert "aoti_torch" not in turn and "std::swap(buf1, body_buf0);" in turn and "auto& body_arg0 = buf1;" in turn


@pytest.mark.parametrize(
    "line",
    [
        "auto body_buf1 = wrap_with_raii_handle(reinterpret_tensor_wrapper(body_buf0, 0, i, i, 0L)); body_buf0.reset();",
        "auto body_buf1 = std::move(body_buf0);  // reuse\n        auto body_buf2 = f(reinterpret_tensor_wrapper(body_buf1, 0));",
    ],
)
def test_memory_reused_with_another_shape_is_allocated_in_each_iteration(line: str) -> None:
    code = in_place(LOOP.replace("        body_arg0.reset();", f"        {line}\n        body_arg0.reset();"))
    before, _, turn = code.partition("while (1) {")
    assert "aoti_torch_empty_strided" not in before and "aoti_torch_empty_strided" in turn and "swap" not in turn


def test_unrecognized_code_is_unchanged() -> None:
    unknown = LOOP.replace("aoti_torch_assign_tensors_out(arg0_1, &buf1_handle)", "other(arg0_1, &buf1_handle)")
    assert in_place(unknown) == unknown


def test_doubles_are_summed_in_registers() -> None:
    prefix = "#include <torch/csrc/inductor/cpp_prefix.h>"
    code = folded(
        f"{prefix}\nx = at::vec::vec_reduce_all<double, 2>(op, v);\n{prefix}\nf = at::vec::vec_reduce_all<float, 1>(op, v);"
    )
    assert code.count("static inline T energynet_fold") == 1 and code.index(prefix) == 0
    assert "x = energynet_fold<double, 2>(op, v);" in code and "f = at::vec::vec_reduce_all<float, 1>(op, v);" in code
    assert folded(prefix) == prefix


def test_only_unavoidable_messages_are_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    log, heard = logging.getLogger("torch._inductor.ir"), Heard()
    monkeypatch.setattr(log, "handlers", [heard])
    remark = "%s is missing a c-shim implementation, using proxy executor as fallback"
    with rewriting(1):
        log.warning(remark, "aten.linalg_solve_triangular.default")
        log.warning("something else")
    log.warning(remark, "afterward, another's")
    assert [text.split()[0] for text in heard.texts] == ["something", "afterward,"]


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@compiles
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_large_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    monkeypatch.setattr(energynet.compiled.inductor, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(energynet.compiled.inductor, "by_onednn", lambda source: sources.append(by_onednn(source)) or sources[-1])
    torch.manual_seed(0)
    W = torch.randn(300, 400) / 20
    whole, part = W[:, :99].contiguous(), W[:, 5:104]

    def energy(x: Tensor, V: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x @ V.T).square().mean(-1) + 0.5 * (x - 1).square().sum(-1)

    def solved(driver: Driver, V: Tensor) -> list[Tensor]:
        V = V.detach().requires_grad_()
        x = minimize(energy, torch.zeros(80, 99), V, step_size=0.5, solver=Picard(), driver=driver).value
        return [x.detach(), torch.autograd.grad(x.square().sum(), V)[0]]

    for V in (whole, part):
        with fresh_cache():  # a program that lies on the disk is not written again
            torch.testing.assert_close(solved(Compiled(strict=True), V), solved(Eager(), V), rtol=1e-3, atol=2e-4)
    assert sources and all("energynet_mm_out(while_loop_body" in source for source in sources)
    assert by_onednn("aoti_torch_cpu_mm_out(") == "aoti_torch_cpu_mm_out("  # of another form than expected


@compiles
def test_inductors_code_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real program: its loop makes less memory, and sums doubles in registers; the batch is in two parts."""
    seen: list[tuple[str, str]] = []

    def observed(source: str, parts: int) -> str:
        seen.append((source, rewritten(source, parts)))
        return seen[-1][1]

    monkeypatch.setattr(energynet.compiled.inductor, "rewritten", observed)
    torch.set_num_threads(2)
    z = torch.randn(128, 32, dtype=torch.float64)
    with fresh_cache():  # a program that lies on the disk is not written again
        minimize(lambda x, z: 0.5 * (x - z).square().sum(-1) + x.cosh().log().sum(-1), torch.zeros_like(z), z, step_size=0.4,
                 driver=Compiled(strict=True))  # fmt: skip
    (before, after), *others = seen
    assert not others
    loops = [turn_of(text) for text in (before, after)]
    assert loops[1].count("aoti_torch_empty_strided") < loops[0].count("aoti_torch_empty_strided")
    assert "std::move" in loops[0] and "std::swap" in loops[1]
    assert "vec_reduce_all<double" in before and "energynet_fold<double" in after
    assert "one_part(input_handles" in after


def turn_of(source: str) -> str:
    """The body of the longest loop without loops inside."""
    bodies = []
    for begin in re.finditer(r"while \(1\) \{", source):
        depth, end = 1, begin.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        bodies.append(source[begin.end() : end])
    return max((body for body in bodies if "while (1)" not in body), key=len)
