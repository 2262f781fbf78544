"""A linear layer whose weight is e4m3 numbers with a power of two for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8 import products
from collage.fp8.codes import E4M3, coded
from collage.fp8.owning import forget, keep_remainder, remainder_of
from collage.fp8.saving import has_all, load_scale, save_scale
from collage.fp8.sharding import enlist
from collage.sharding import in_rows, is_dtensor, local, placed


class Float8Linear(nn.Linear):
    """nn.Linear with weight float8_e4m3fn [out, in], weight_scale uint8 [out] (a byte E stands for 2**(E - 127)).

    product: "scaled_mm" multiplies in fp8, with activations and gradients scaled for each of their rows; "decoded" in
    the activations' dtype with what the weight stands for; "auto" takes the former where a device is made for it.
    grad_dtype: of the weight's gradient, bfloat16 or float32.
    remainder: int16 [out, in], what e4m3 cut off of the weight when it was converted, or loaded as other numbers, until
        an optimizer takes it; None: nothing is known. It is good while the weight's version is `remainder_at`.
    """

    weight_scale: Tensor
    _handle: Tensor
    _handle_of: Tensor
    product: str
    grad_dtype: torch.dtype
    remainder: Tensor | None
    remainder_at: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Float8Linear:
        """A module that is unpickled or copied is registered too."""
        module = super().__new__(cls)
        enlist(module)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] of its dtype; under autocast, of autocast's."""
        if not torch.compiler.is_compiling() and is_dtensor(self.weight):
            raise TypeError(
                f"Float8Linear: this rank has a part of its weight, {tuple(local(self.weight).shape)} of "
                f"{tuple(self.weight.shape)}, and multiplies with a whole one; shard it with fully_shard, and call the "
                "module that this was given, or name the layer in skip= of collage.fp8.convert"
            )
        if not x.is_floating_point() or x.dtype.itemsize == 1:
            raise TypeError(
                f"Float8Linear: x is {x.dtype}, and needs 16 bits or more; where a model casts it to the dtype of this "
                "weight, or takes the weight for a matrix, name the layer in skip= of collage.fp8.convert"
            )
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        elif bias is not None and bias.dtype != x.dtype:
            raise TypeError(
                f"Float8Linear: x is {x.dtype} and the bias {bias.dtype}; cast one of them, or use torch.autocast"
            )
        return _product(x, self.weight.detach(), self.weight_scale, self._current_handle(), bias, self.product)

    def missing(self, dtype: torch.dtype = torch.bfloat16) -> str:
        """Why activations of a dtype are not multiplied in fp8 where the weight is now; "": they are."""
        return products.missing(self.weight, dtype, self.product)

    def _current_handle(self) -> Tensor:
        """What stands for the weight in the graph of gradients; a new one where the weight was exchanged."""
        if self._handle.requires_grad != self.weight.requires_grad or not torch.compiler.is_compiling():
            self.renew()
        return self._handle

    @torch.compiler.disable(reason="a weight was exchanged, frozen or unfrozen: run one forward without compiling")  # type: ignore[no-untyped-call, untyped-decorator]
    def renew(self) -> None:
        """Let the weight take gradients of `grad_dtype`: a copy of it would take those of its own dtype."""
        weight, handle = self.weight, self.__dict__.get("_handle")
        if handle is not None and self._handle_of is weight and _alike(handle, weight):
            return
        if weight.is_leaf and weight.grad_dtype == weight.dtype:
            weight.grad_dtype = self.grad_dtype
        with torch.inference_mode(False), torch.enable_grad():
            self.__dict__.update(_handle=_handle(weight, self.grad_dtype), _handle_of=weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "weight":
            self.renew()

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP2 exchanges parameters behind `register_parameter`, unless a class has this."""
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=e4m3, product={self.product}"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_handle_of")}
        return state | ({"remainder": None} if remainder_of(self.weight) is None else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        keep_remainder(self, self.__dict__.get("remainder"))  # the weight is another tensor, of another version
        self.renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Move the weight with the rest, and let no cast destroy it: as bytes it is nothing that is cast."""

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.uint8)).view(E4M3) if tensor.dtype == E4M3 else fn(tensor)

        forget(self)
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self.renew()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_scale(self, destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take e4m3 and scales as they are, other numbers as `convert` does.

        What that cuts off is the remainder then (not of a sharded weight), unless nothing is: e4m3 numbers in another
        dtype say no more than codes, which leave what an optimizer has. An old one stays if the weight does.
        """
        given = state_dict.get(f"{prefix}weight")
        low = None if self.remainder is None or not has_all(self, state_dict, prefix) else remainder_of(self.weight)
        if isinstance(given, Tensor) and given.is_floating_point() and given.dtype != E4M3:
            given = placed(given, self.weight)
            hi, cut, scale = coded(local(given))
            low = cut if not is_dtensor(given) and cut.shape == self.weight.shape and bool(cut.any()) else None
            shown = in_rows(hi, given.shape, given), in_rows(scale, given.shape[:1], given)
            state_dict |= zip((f"{prefix}weight", f"{prefix}weight_scale"), shown, strict=True)
        load_scale(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        keep_remainder(self, low)
        self.renew()


_product: Callable[..., Tensor] = products.Product.apply


def _handle(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for the weight; its gradient is passed on before all else, as a leaf's is: FSDP2 then reduces it."""
    apply: Callable[..., Any] = products.Handle.apply
    handle = apply(weight, dtype)
    if handle.grad_fn is not None:
        handle.grad_fn._set_sequence_nr(2**64 - 1)
    return handle  # type: ignore[no-any-return]


def _alike(handle: Tensor, weight: Tensor) -> bool:
    return handle.device == weight.device and handle.requires_grad == weight.requires_grad
