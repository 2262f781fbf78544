"""FSDP2's record of an e4m3 weight. Imported where a layer is converted: it brings torch.distributed's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from collage.fp8.owning import adopt, gradient_dtype, scale_of
from collage.sharding import local


class Float8Shard(FSDPParam):
    """An e4m3 weight with a power of two for each row, sharded by rows."""

    all_gather_outputs: list[Tensor]

    def _init_sharded_param(self, param: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        self._gradient_dtype = gradient_dtype(param)
        super()._init_sharded_param(param, *args, **kwargs)
        self._refuse()
        self._own(self.sharded_param, self._gradient_dtype)

    def _refuse(self) -> None:
        if self.fsdp_placement.dim:
            raise ValueError(
                f"a float8 weight of shape {tuple(self._orig_size)} has a scale for every row, and is to be "
                f"sharded along dimension {self.fsdp_placement.dim}; have shard_placement_fn return Shard(0) for it"
            )
        if self.offload_to_cpu and self.device.type != "cpu":
            raise ValueError(
                f"a float8 weight of shape {tuple(self._orig_size)} stays with its row scales on {self.device}; "
                "shard its module without CPUOffloadPolicy"
            )

    def _own(self, param: nn.Parameter, dtype: torch.dtype) -> None:
        adopt(self._module_info.module, param)
        if param.grad_dtype == param.dtype:  # nobody has said otherwise
            param.grad_dtype = dtype

    def reset_sharded_param(self) -> None:
        super().reset_sharded_param()  # type: ignore[no-untyped-call]
        self._own(self.sharded_param, self._gradient_dtype)

    def init_dtype_attrs(self, mp_policy: Any) -> None:
        """What FSDP2 calls the original dtype is that of the reduced gradient. Weights are cast to none."""
        super().init_dtype_attrs(mp_policy)
        self.orig_dtype, self.param_dtype = self._gradient_dtype, None

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        """This rank's rows as bytes, and their scales; both padded to what the first rank has."""
        own = local(scale_of(self.sharded_param))
        scales = own.new_zeros(self.padded_sharded_param_size[0])
        scales[: len(own)] = own
        return [self._sharded_param_data.view(torch.uint8), scales]

    def init_unsharded_param(self) -> None:
        with self._as_weights():
            super().init_unsharded_param()  # type: ignore[no-untyped-call]
        self._own(self._unsharded_param, self.mp_policy.param_dtype or self._gradient_dtype)
        whole = local(scale_of(self._unsharded_param))
        with _unsafe_preserve_version_counter(whole):  # the backward pass needs the same numbers
            for gathered in self.all_gather_outputs[1:]:
                whole.copy_(gathered[: len(whole)])

    def to_sharded_post_forward(self) -> None:
        raise NotImplementedError(
            "a float8 weight is gathered with its row scales, and sharded over all ranks again or not at all: give "
            "fully_shard reshard_after_forward=True or False, not the number of ranks"
        )

    @contextmanager
    def _as_weights(self) -> Iterator[None]:
        gathered = self.all_gather_outputs
        self.all_gather_outputs = [gathered[0].view(torch.float8_e4m3fn)]
        try:
            yield
        finally:
            self.all_gather_outputs = gathered

    @property
    def unsharded_zero_grad_data(self) -> Any:
        like = self.unsharded_param
        return self._get_grad_inner_tensor(torch.zeros_like(like, dtype=like.grad_dtype))
