"""Every attention backend that a CPU has computes what the published processors do; how one is chosen, and kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from peft import LoraConfig
from torch import Tensor, nn

from opd_fast.engine import attention_choice as attention
from opd_fast.engine.attention import BACKENDS, available, route
from opd_fast.engine.attention_choice import Case, cache_file, choose, unfit
from opd_fast.engine.fused_qkv import fuse_projections
from opd_fast.errors import UserError
from opd_fast.models.joint_attention import JointAttention
from opd_fast.models.z_image_transformer import ZImageTransformer2DModel
from tests.techniques import sites
from tests.tiny import tiny_transformer
from tests.tiny_flux import tiny_flux_transformer
from tests.tiny_qwen import tiny_transformer as tiny_qwen
from tests.tiny_z_image import tiny_transformer as tiny_z_image

HERE = ("native", "flash", "math", "products")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
# (dual attention and norms as in SD3.5, neither as in SD3)
SD3 = {"sd3.5": {}, "sd3": {"qk_norm": None, "dual_attention_layers": ()}}
CASE = Case(torch.device("cpu"), torch.float32, 2, 2, 8, 24, needs_grad=True, products=True)

Call = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention.json"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call_sd3(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, noise(2, 5, 32), noise(2, 32), torch.tensor([500.0, 20.0]), return_dict=False)[0]


def call_flux(network: nn.Module, x: Tensor) -> Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return network(
        hidden_states=x.reshape(2, 16, 16),
        encoder_hidden_states=noise(2, 5, 32),
        pooled_projections=noise(2, 16),
        timestep=torch.tensor([0.5, 0.1]),
        guidance=torch.ones(2),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]


MASK = torch.arange(7) < torch.tensor([[7], [3]])


def call_qwen(network: nn.Module, x: Tensor) -> Tensor:
    return network(
        hidden_states=x.reshape(2, 16, 16),
        encoder_hidden_states=noise(2, 7, 32),
        encoder_hidden_states_mask=MASK,
        timestep=torch.tensor([0.5, 0.1]),
        img_shapes=[[(1, 4, 4)]] * 2,
        return_dict=False,
    )[0]


def call_z_image(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, torch.tensor([0.5, 0.1]), noise(2, 7, 32), cap_mask=MASK)


def z_image() -> nn.Module:
    published = tiny_z_image()
    ours = ZImageTransformer2DModel.from_config(published.config)
    ours.load_state_dict(published.state_dict())
    return ours.eval()


# (transformer, how it is called, attention modules); the last two have a mask
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Call, int]] = {
    "flux": (tiny_flux_transformer, call_flux, 3),
    "qwen": (tiny_qwen, call_qwen, 2),
    "z_image": (z_image, call_z_image, 4),
}


def run(network: nn.Module, call: Call) -> list[Tensor]:
    """The output, the gradient of the input and those of the trainable parameters."""
    x = noise(2, 4, 8, 8, seed=2).requires_grad_()
    out = call(network, x)
    trained = [p for p in network.parameters() if p.requires_grad]
    slopes = torch.autograd.grad((out * noise(*out.shape, seed=3)).sum(), [x, *trained], allow_unused=True)
    return [out.detach(), *(torch.zeros(1) if slope is None else slope for slope in slopes)]


def assert_same(found: list[Tensor], wanted: list[Tensor], limit: float = 3e-6) -> None:
    largest = max(float(right.norm()) for right in wanted[1:])
    assert len(found) == len(wanted)
    for got, right in zip(found, wanted, strict=True):  # some gradients are zero but for rounding
        assert (got - right).norm() <= limit * right.norm() + 1e-7 * largest


def operations(work: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key for event in profile.key_averages()}


# --- the computation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SD3)
@pytest.mark.parametrize("backend", HERE)
def test_sd3_equals_the_published_processor(kind: str, backend: str) -> None:
    network = tiny_transformer(**SD3[kind])
    wanted = run(network, call_sd3)
    assert route(sites(network), backend) == {"sd3.5": 3, "sd3": 2}[kind]
    assert_same(run(network, call_sd3), wanted)
    assert (FLASH in operations(lambda: run(network, call_sd3))) == (backend in ("native", "flash"))


@pytest.mark.parametrize("kind", SD3)
@pytest.mark.parametrize("backend", HERE)
def test_sd3_with_fused_projections(kind: str, backend: str) -> None:
    network = tiny_transformer(**SD3[kind]).requires_grad_(False)
    wanted = run(network, call_sd3)
    fuse_projections(network, sites(network))
    route(sites(network), backend)
    assert_same(run(network, call_sd3), wanted)


@pytest.mark.parametrize("backend", HERE)
def test_sd3_with_adapters(backend: str) -> None:
    network = tiny_transformer()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    wanted = run(network, call_sd3)
    route(sites(network), backend)
    assert_same(run(network, call_sd3), wanted)


def test_sd3_in_half_precision() -> None:
    """Adapters in float32 on a bfloat16 base under autocast, as a student runs."""
    network = tiny_transformer()
    targets = ["attn.to_q", "attn.to_v", "attn.add_k_proj"]
    network.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    wanted = run(network, call_sd3)
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    for backend in HERE:
        route(sites(network), backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = [t.float() for t in run(network, lambda net, x: call_sd3(net, x.bfloat16()))]
        assert_same(found, wanted, 0.05)


def test_sd3_refuses_a_mask() -> None:
    network = tiny_transformer()
    route(sites(network), "native")
    with pytest.raises(ValueError, match="has no mask"):
        network.transformer_blocks[0].attn(noise(2, 4, 32), noise(2, 3, 32), attention_mask=torch.ones(2, 7).bool())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["native", "math"])
def test_families_of_the_dispatcher(family: str, backend: str) -> None:
    build, call, count = FAMILIES[family]
    network = build()
    wanted = run(network, call)
    assert route(sites(network), backend) == count
    assert_same(run(network, call), wanted)
    assert (FLASH in operations(lambda: run(network, call))) == (backend != "math")


def test_one_transformer_routed_leaves_the_others() -> None:
    active = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    for build, call in ((tiny_transformer, call_sd3), (tiny_flux_transformer, call_flux)):
        network = build()
        other = copy.deepcopy(network)
        route(sites(network), "math")
        assert FLASH not in operations(lambda network=network, call=call: run(network, call))
        assert FLASH in operations(lambda other=other, call=call: run(other, call))
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == active


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", HERE)
def test_compiled_blocks_of_sd3(backend: str, fused: bool) -> None:
    torch.compiler.reset()
    network = tiny_transformer().requires_grad_(not fused)
    wanted = run(network, call_sd3)
    if fused:
        fuse_projections(network, sites(network))
    route(sites(network), backend)
    for block in network.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(network, call_sd3), wanted)
    assert (FLASH in operations(lambda: run(network, call_sd3))) == (backend in ("native", "flash"))


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_compiled_blocks_of_flux(backend: str) -> None:
    torch.compiler.reset()
    network = tiny_flux_transformer()
    wanted = run(network, call_flux)
    route(sites(network), backend)
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(network, call_flux), wanted)
    assert (FLASH in operations(lambda: run(network, call_flux))) == (backend != "math")


def test_route_leaves_processors_of_other_kinds() -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return hidden_states, encoder_hidden_states

    network = tiny_transformer()
    network.transformer_blocks[0].attn.set_processor(Own())
    assert route(sites(network), "math") == 2
    assert isinstance(network.transformer_blocks[0].attn.processor, Own)
    assert isinstance(network.transformer_blocks[0].attn2.processor, JointAttention)
    assert route(sites(nn.Linear(2, 2)), "math") == 0


def test_products_are_sd3s() -> None:
    network = tiny_flux_transformer()
    with pytest.raises(ValueError, match="products is not offered for this model's attention"):
        route(sites(network), "products")
    assert all(m.processor._attention_backend is None for m in network.modules() if hasattr(m, "processor"))


# --- the cases -------------------------------------------------------------------------------------------------------


def test_case_of_a_transformer() -> None:
    given: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "rows": 3, "tokens": 21}
    shape = (3, 4, 8, 21)
    case = Case.of(sites(tiny_transformer()), **given, needs_grad=True)
    assert (case.rows, case.heads, case.head_dim, case.tokens) == shape
    assert (case.products, case.mixed, case.needs_grad, case.mask) == (True, False, True, False)
    routed = tiny_transformer()
    route(sites(routed), "math")
    assert Case.of(sites(routed), **given).products
    for build, mixed in ((tiny_flux_transformer, True), (tiny_qwen, False), (tiny_z_image, False)):
        case = Case.of(sites(build()), **given)
        assert (case.rows, case.heads, case.head_dim, case.tokens, case.products) == (3, 2, 16, 21, False)
        assert case.mixed is mixed  # torch's RMSNorm is of autocast's float32 list, diffusers' own is not
    assert not Case.of(sites(tiny_flux_transformer()), **(given | {"dtype": torch.float32})).mixed
    with pytest.raises(ValueError, match="the transformer has no attention"):
        Case.of(sites(nn.Linear(2, 2)), **given)


def changed(**changes: Any) -> Case:
    return Case(**({name: getattr(CASE, name) for name in CASE.__dataclass_fields__} | changes))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("products", {"mask": True}, "is not used with a mask"),
        ("flash", {"mask": True}, "is not used with a mask"),
        ("products", {"products": False}, "not offered for this model's attention"),
        ("products", {"tokens": 4096}, "would keep 256 MiB of scores"),
        ("cudnn", {}, "needs a CUDA device, not cpu"),
        ("efficient", {}, "needs a CUDA device, not cpu"),
        ("xformers", {}, "needs a CUDA device, not cpu"),
    ],
)
def test_what_a_case_rules_out(name: str, changes: dict[str, Any], said: str) -> None:
    reason = unfit(name, changed(**changes))
    assert reason is not None
    assert said in reason


def test_what_a_cuda_case_rules_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for switch in ("_CAN_USE_XFORMERS_ATTN", "_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3"):
        monkeypatch.setattr(attention_dispatch, switch, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert all(available(name, cuda, torch.bfloat16) is None for name in BACKENDS)
    case = changed(device=cuda, dtype=torch.bfloat16)
    assert "has no gradient" in str(unfit("flash_3", case))
    assert unfit("flash_3", changed(device=cuda, dtype=torch.bfloat16, needs_grad=False)) is None
    # cuDNN's backward under a mask gave NaN on an H100 (pytorch#196678).
    masked = changed(device=cuda, dtype=torch.bfloat16, mask=True)
    assert [name for name in BACKENDS if unfit(name, masked) is None] == ["native", "efficient", "math"]
    mixed = changed(device=cuda, dtype=torch.bfloat16, mixed=True, needs_grad=False)
    assert [n for n in BACKENDS if "of one dtype" in str(unfit(n, mixed))] == ["xformers", "flash_2", "flash_3"]
    for name in ("flash", "cudnn", "flash_2", "flash_3"):
        assert "computes in bfloat16 or float16, not float32" in str(available(name, cuda, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, this device has 7.5" in str(available("flash", cuda, torch.float16))
    assert "needs compute capability 9.0" in str(available("flash_3", cuda, torch.float16))
    assert available("xformers", cuda, torch.float16) is None


@pytest.mark.parametrize(
    ("name", "switch", "remedy"),
    [
        ("xformers", "_CAN_USE_XFORMERS_ATTN", "pip install 'opd_fast[xformers]'"),
        ("flash_2", "_CAN_USE_FLASH_ATTN", "pip install 'opd_fast[flash]'"),
        ("flash_3", "_CAN_USE_FLASH_ATTN_3", "hopper"),
    ],
)
def test_missing_packages_and_their_remedy(name: str, switch: str, remedy: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_dispatch, switch, False)
    reason = available(name, torch.device("cuda"), torch.bfloat16)
    assert reason is not None
    assert "is not installed" in reason
    assert remedy in reason


def test_unknown_names() -> None:
    network = tiny_transformer()
    for work in (
        lambda: choose("cudn", CASE),
        lambda: available("cudn", CASE.device, CASE.dtype),
        lambda: route(sites(network), "cudn"),
        lambda: available("cudn", torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(UserError, match=r"engine\.attention: is 'cudn'; did you mean cudnn\?"):
            work()
    with pytest.raises(UserError, match="is 'auto'"):
        route(sites(network), "auto")


# --- the choice ------------------------------------------------------------------------------------------------------


def timed(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
    monkeypatch.setattr(attention, "_time_cpu", lambda trials: {name: [milliseconds[name]] * 5 for name in trials})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_measures_what_is_right(grad: bool, dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        choice = choose("auto", changed(needs_grad=grad, dtype=dtype))
    assert choice.milliseconds.keys() == {"native", "math", "products"}
    assert not choice.dropped
    fastest = min(choice.milliseconds.values())
    assert choice.milliseconds[choice.backend] <= 1.05 * fastest
    assert choice.line.startswith(f"attention: {choice.backend} (")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_fastest_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=2.126, products=1.0, math=7.4)
    choice = choose("auto", CASE)
    assert choice.backend == "products"
    assert choice.line == "attention: products (1 ms; native 2.13, math 7.4)"


def test_native_stays_unless_another_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=1.04, products=1.0, math=7.4)
    assert choose("auto", CASE).backend == "native"


def test_masked_and_large_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=3.0, math=2.0, products=1.0)
    assert choose("auto", changed(mask=True)).milliseconds == {"native": 3.0, "math": 2.0}
    monkeypatch.setattr(attention, "SCORES_BYTES", 2 * 2 * 24 * 24 * 4 - 1)
    assert choose("auto", CASE).milliseconds == {"native": 3.0}


def sabotage(monkeypatch: pytest.MonkeyPatch, **wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    honest = attention.attention_fn
    monkeypatch.setattr(attention, "attention_fn", lambda name, mask=None: wrong.get(name) or honest(name, mask))


def broken(*_: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


def test_wrong_backends_are_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=2.0, math=1.0, products=1.0)
    honest = attention.attention_fn("native")
    sabotage(monkeypatch, math=lambda q, k, v: honest(q, k * 1.01, v), products=broken)
    choice = choose("auto", CASE)
    assert choice.backend == "native"
    assert choice.milliseconds == {"native": 2.0}
    assert choice.dropped["math"].startswith("gives a result off by ")
    assert choice.dropped["products"] == "fails (no kernel for this)"
    assert "; math dropped: gives a result off by" in choice.line
    assert "; products dropped: fails (no kernel for this)" in choice.line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda q, k, v: attention.products(q, k, v) * float("nan"), "gives a result that is not finite"),
        (lambda q, k, v: attention.products(q, 0.5 * k + 0.5 * k.detach(), v), "gives a gradient of k off by 5.0e-01"),
        (lambda q, k, v: attention.products(q.detach(), k, v), "fails ("),
    ],
)
def test_what_is_wrong_with_a_backend(wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, math=wrong)
    assert choose("auto", CASE).dropped["math"].startswith(said)


def test_wrong_in_one_row_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's mask is not all true: a backend that ignores it is found out."""
    honest = attention.attention_fn
    monkeypatch.setattr(
        attention, "attention_fn", lambda name, mask=None: honest(name, mask if name != "math" else None)
    )
    assert choose("auto", changed(mask=True)).dropped.keys() == {"math"}


def test_out_of_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    timed(monkeypatch, native=2.0, math=1.0, products=3.0)
    with monkeypatch.context() as patch:
        sabotage(patch, math=full)
        assert choose("auto", CASE).dropped == {"math": "runs out of memory"}
    assert not cache.exists()
    assert choose("auto", CASE).backend == "math"


def test_no_backend_is_right(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    sabotage(monkeypatch, native=broken, math=broken, products=broken)
    with pytest.raises(UserError, match=r"no backend computes this attention \(native: fails \(no kernel"):
        choose("auto", CASE)
    assert not cache.exists()


def test_a_named_backend_is_taken(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch)  # any measurement would fail
    for name in HERE:
        choice = choose(name, CASE)
        assert (choice.backend, choice.line) == (name, f"attention: {name} (as set)")
    assert not cache.exists()


def test_a_named_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=2.0, math=3.0, products=1.0)
    choice = choose("xformers", CASE)
    assert choice.backend == "products"
    needs = "needs a CUDA device, not cpu; take native"
    assert choice.line == f"attention: xformers {needs}; instead products (1 ms; native 2, math 3)"


def test_a_named_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, native=2.0, math=3.0, products=1.0)
    sabotage(monkeypatch, flash=broken)
    choice = choose("flash", CASE)
    assert choice.backend == "products"
    assert choice.line.startswith("attention: flash fails (no kernel for this); instead products (1 ms")


# --- what was measured earlier ---------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch, native=2.0, math=3.0, products=1.0)
    sabotage(monkeypatch, math=broken)
    first = choose("auto", CASE)
    assert [file.name for file in cache.parent.iterdir()] == ["attention.json"]
    timed(monkeypatch, native=1.0, math=3.0, products=2.0)
    second = choose("auto", CASE)
    assert (second.backend, second.milliseconds, second.dropped) == ("products", first.milliseconds, first.dropped)
    assert "(1 ms; native 2; measured earlier); math dropped: fails" in second.line
    # Whatever the time depends on is measured anew, and kept beside the first.
    for changes in (
        {"rows": 3},
        {"heads": 3},
        {"tokens": 25},
        {"head_dim": 16},
        {"dtype": torch.bfloat16},
        {"needs_grad": False},
        {"mask": True},
        {"products": False},
    ):
        assert choose("auto", changed(**changes)).backend == "native"
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert choose("auto", CASE).backend == "native"
    assert len(json.loads(cache.read_text())["measured"]) == 10


@pytest.mark.parametrize(
    "damage", ["", "[]", "not json", '{"format": 0, "measured": {}}', '{"format": 2, "measured": 3}']
)
def test_a_damaged_file_is_measured_anew(damage: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch, native=1.0, math=3.0, products=2.0)
    cache.parent.mkdir()
    cache.write_text(damage)
    assert choose("auto", CASE).backend == "native"
    assert len(json.loads(cache.read_text())["measured"]) == 1


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"milliseconds": {}},
        {"milliseconds": {"native": 1.0}, "dropped": {}},
        {"milliseconds": {"native": 1.0}, "dropped": {}, "until": "soon"},
        {"milliseconds": {}, "dropped": {}, "until": None},
        {"milliseconds": {"native": -1.0}, "dropped": {}, "until": None},
        {"milliseconds": {"native": float("nan")}, "dropped": {}, "until": None},
        {"milliseconds": {"native": "soon"}, "dropped": {}, "until": None},
        {"milliseconds": {"gone": 1.0}, "dropped": {}, "until": None},
        {"milliseconds": [1.0], "dropped": {}, "until": None},
    ],
)
def test_a_damaged_entry_is_measured_anew(entry: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch, native=1.0, math=3.0, products=2.0)
    choose("auto", CASE)
    content = json.loads(cache.read_text())
    content["measured"] = dict.fromkeys(content["measured"], entry)
    cache.write_text(json.dumps(content))
    assert choose("auto", CASE).milliseconds == {"native": 1.0, "math": 3.0, "products": 2.0}
    assert content != json.loads(cache.read_text())


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "file"))
    timed(monkeypatch, native=1.0, math=3.0, products=2.0)
    assert choose("auto", CASE).backend == "native"


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == tmp_path / "cache" / "attention.json"
    monkeypatch.delenv("OPD_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "opd_fast" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "opd_fast" / "attention.json"
