"""Teachers: a model that stays as it is, or its answers kept on disk. A method cannot tell which it was given.

``teacher(batch)`` returns logits [B, C] in fp32, without gradients. :class:`Teacher` runs a model;
:class:`CachedTeacher` looks the answers up by the batch's sample ids and views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import files, scale
from kdlib.fingerprint import fingerprint

PACK, CARD = "pack.safetensors", "card.json"


def _image(batch: dict[str, Any]) -> tuple[Tensor, ...]:
    return (batch["x"],)


class Teacher:
    """A frozen model. It is no ``nn.Module``, so a student that holds it does not inherit its parameters.

    Args:
        model: put in evaluation mode, its parameters frozen; stays on its device.
        name: for cards and messages.
        inputs: what the model is called with, from a batch; a tuple (positional) or a dict (keywords).
        classes: class names in the order of the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        inputs: Callable[[dict[str, Any]], tuple[Any, ...] | dict[str, Any]] = _image,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.model, self.name, self.inputs = model, name, inputs
        self.classes = tuple(classes) if classes is not None else None
        self.model.eval().requires_grad_(False)
        self._versions = self._count()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32, without gradients.

        Raises:
            RuntimeError: somebody put the model in training mode, or changed its weights or buffers.
        """
        self.check()
        arguments = self.inputs(batch)
        where = next((p.device for p in self.model.parameters()), None)
        if isinstance(arguments, dict):
            out = self.model(**{k: _to(v, where) for k, v in arguments.items()})
        else:
            out = self.model(*(_to(v, where) for v in arguments))
        return getattr(out, "logits", out).float()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation mode whatever is asked."""
        return self

    def eval(self) -> Teacher:
        return self

    def check(self) -> None:
        """Raise RuntimeError unless the model is as it was wrapped: evaluation mode, same weights, no gradients."""
        if any(module.training for module in self.model.modules()):
            raise RuntimeError(
                f"teacher {self.name!r} was put in training mode: dropout and batch-norm would change its answers. "
                "Do not call .train() on its model; if it is part of a larger module, keep it out of there"
            )
        if self._count() != self._versions:
            raise RuntimeError(f"the weights or buffers of teacher {self.name!r} were changed; wrap the new model anew")
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RuntimeError(f"a parameter of teacher {self.name!r} takes gradients; leave requires_grad off")

    def _count(self) -> int:
        """Sum of the tensors' version counters: goes up with every change in place."""
        return sum(t._version for t in (*self.model.parameters(), *self.model.buffers()))

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, architecture and inputs."""
        return fingerprint(self.model, self.inputs)


def _to(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


class CachedTeacher:
    """A teacher's answers, found by ``batch["id"]`` and ``batch["view"]`` (0 where a batch has none).

    Made by :func:`cache_teacher`, or read from a pack that was handed on by :meth:`load`.
    """

    def __init__(self, ids: Tensor, answers: dict[str, Tensor], card: dict[str, Any], folder: Path) -> None:
        self.ids, self.card, self.folder = ids, card, folder
        self.name, self.classes = card["teacher"], card["classes"] and tuple(card["classes"])
        self.views = list(card["views"])
        logits = answers["logits"] if "logits" in answers else _dense(answers, card["vocabulary"])
        self._table = logits.flatten(0, 1)  # row of view v and position n: v * N + n
        self._first = int(ids.min())
        self._row = torch.full((int(ids.max()) - self._first + 1,), -1)
        self._row[ids - self._first] = torch.arange(len(ids))
        self._view = torch.full((max(self.views) + 1,), -1)
        self._view[torch.tensor(self.views)] = torch.arange(len(self.views))

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32, on the device of ``batch["id"]``.

        Raises:
            ValueError: an id or a view that the teacher was not asked about.
        """
        ids, view = batch["id"], batch.get("view")
        if ids.device != self._table.device:
            self._table, self._row, self._view = (t.to(ids.device) for t in (self._table, self._row, self._view))
        at = ids - self._first
        inside = (at >= 0) & (at < len(self._row))
        rows = torch.where(inside, self._row[at.clamp(0, len(self._row) - 1)], -1)
        views = torch.zeros_like(rows)
        if view is not None:
            views = torch.where(view < len(self._view), self._view[view.clamp(max=len(self._view) - 1)], -1)
        unknown = (rows < 0) | (views < 0)
        answer = self._table[(views * len(self.ids) + rows).clamp(min=0)].float()
        if ids.is_cuda:  # to look here would make every step wait for the GPU: NaN stops the run at the epoch's end
            return answer.masked_fill(unknown.unsqueeze(-1), float("nan"))
        if unknown.any():
            self._refuse(ids[rows < 0], view[views < 0] if view is not None else None)
        return answer

    def _refuse(self, ids: Tensor, views: Tensor | None) -> None:
        if len(ids):
            raise ValueError(
                f"teacher {self.name!r} was never asked about id {int(ids[0])} ({len(ids)} such in this batch); its pack was "
                f"made for {self.card['data']!r}. Cache it for the data you train on"
            )
        raise ValueError(
            f"teacher {self.name!r} has views {self.views}, the batch asks for view {int(views[0])}; "
            "give cache_teacher the views that the augmentation makes, such as views=(0, 1) for flip=True"
        )

    @property
    def fingerprint(self) -> str:
        """Of the data, weights, views and precision behind the answers."""
        return self.card["fingerprint"]

    @classmethod
    def load(cls, folder: str | Path, data: Any | None = None) -> CachedTeacher:
        """Read a pack. With ``data``, it must have been made for that data.

        Raises:
            FileNotFoundError: no pack there.
            ValueError: it is damaged, incomplete, or was made for other data.
        """
        folder = Path(folder)
        if not (folder / CARD).exists() or not (folder / PACK).exists():
            raise FileNotFoundError(f"{folder} is no pack of teacher's answers: it needs {CARD} and {PACK}")
        card = files.read_json(folder / CARD)
        if files.sha256(folder / PACK) != card["sha256"]:
            raise ValueError(f"{folder / PACK} is not the file that its card describes (checksum differs); copy it again")
        if data is not None and data.fingerprint != card["data_fingerprint"]:
            raise ValueError(
                f"the pack in {folder} was made for {card['data']!r} as it was then; the data now differ "
                "(other images, order, size or normalisation). Ask the teacher again with kd.cache_teacher"
            )
        tensors, _ = files.read_tensors(folder / PACK)
        return cls(tensors.pop("ids"), tensors, card, folder)


def cache_teacher(
    teacher: Teacher,
    data: Any,
    *,
    views: Sequence[int] = (0,),
    folder: str | Path | None = None,
    top_k: int | None = None,
    dtype: torch.dtype = torch.float32,
    licence: str = "",
) -> CachedTeacher:
    """Ask ``teacher`` once about every example and view of ``data``, and keep the answers with a card.

    A pack made before is used if data, weights, views and precision are the same and the file is whole; else it is
    made again, and why is said. Two processes that ask at once make it once.

    Args:
        teacher: the live teacher.
        data: with ``ids`` [N], ``fingerprint`` and ``view_batches(view)``: an image or text set, not its batches.
        views: which deterministic views of the data (1 is the mirror image).
        folder: where to put the pack; by default in the store.
        top_k: keep only the largest k logits of each row; the rest of the probability is spread evenly.
        dtype: of the stored logits.
        licence: of the answers, for the card.

    Raises:
        ValueError: ``data`` is augmented at random, has repeated ids, or the teacher answers NaN.
        OSError: the disk is full; nothing is left behind.
    """
    if not hasattr(data, "view_batches"):
        raise ValueError(
            f"a {type(data).__name__} is augmented or shuffled as it is read, so answers for it cannot be kept; pass the "
            "data set itself and name the views: cache_teacher(teacher, data_set, views=(0, 1))"
        )
    if len(data.ids.unique()) != len(data.ids):
        raise ValueError("ids repeat in the data, so an answer could belong to two examples; give every example its own id")
    key = fingerprint(teacher.fingerprint, data.fingerprint, list(views), str(dtype), top_k, scale.precision())
    where = Path(folder) if folder else files.home() / "teachers" / f"{_slug(teacher.name)}-{key[:12]}"
    with files.lock(where):
        found = _usable(where, key)
        return found or _ask(teacher, data, views, where, top_k, dtype, licence, key)


def _usable(folder: Path, key: str) -> CachedTeacher | None:
    if not (folder / CARD).exists():
        return None
    try:
        pack = CachedTeacher.load(folder)
    except (ValueError, KeyError, OSError) as error:
        print(f"the teacher is asked again: {error}")
        return None
    if pack.fingerprint != key:
        print(f"the teacher is asked again: {folder.name} holds answers of other weights, data, views or precision")
        return None
    return pack


def _ask(
    teacher: Teacher, data: Any, views: Sequence[int], folder: Path, top_k: int | None, dtype: torch.dtype,
    licence: str, key: str,
) -> CachedTeacher:  # fmt: skip
    logits, labels = [], []
    for number, view in enumerate(views):
        for batch in data.view_batches(view):
            logits.append(teacher(batch).cpu())
            if number == 0 and "y" in batch:
                labels.append(batch["y"].cpu())
    whole = torch.cat(logits).unflatten(0, (len(views), len(data.ids)))
    if whole.isnan().any():
        raise ValueError(f"teacher {teacher.name!r} answers NaN; look at its input (normalisation, fp16 overflow)")
    answers = _top(whole, top_k, dtype) if top_k else {"logits": whole.to(dtype)}
    (folder / CARD).unlink(missing_ok=True)  # never a new pack under an old card
    files.write_tensors(folder / PACK, {"ids": data.ids, **answers})
    card = {
        "teacher": teacher.name, "data": data.name, "examples": len(data.ids), "views": list(views),
        "vocabulary": whole.shape[-1], "classes": list(teacher.classes) if teacher.classes else None,
        **_quality(whole[0], torch.cat(labels) if labels else None),
        "top_k": top_k, "dtype": str(dtype).removeprefix("torch."), "computed in": scale.precision().replace("no", "fp32"),
        "licence": licence or "that of the data and the teacher's weights", "made": date.today().isoformat(),
        "torch": torch.__version__, "data_fingerprint": data.fingerprint, "fingerprint": key,
        "sha256": files.sha256(folder / PACK),
    }  # fmt: skip
    files.write_json(folder / CARD, card)
    return CachedTeacher.load(folder)


def _quality(logits: Tensor, labels: Tensor | None) -> dict[str, float]:
    if labels is None or labels.is_floating_point():
        return {}
    from kdlib import metrics

    confidence = logits.softmax(-1).max(-1).values.mean().item()
    values = {"accuracy": metrics.accuracy(logits, labels), "ece": metrics.ece(logits, labels), "confidence": confidence}
    return {name: round(value, 4) for name, value in values.items()}


def _top(logits: Tensor, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The k largest log-probabilities of each row; what is left over belongs to the other classes evenly."""
    log_p = logits.log_softmax(-1)
    values, indices = log_p.topk(min(k, logits.shape[-1]))
    return {"values": values.to(dtype), "indices": indices.to(torch.int32)}


def _dense(answers: dict[str, Tensor], classes: int) -> Tensor:
    values, indices = answers["values"].float(), answers["indices"].long()
    others = classes - values.shape[-1]
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-12) / max(others, 1)
    return rest.log().expand(*values.shape[:-1], classes).scatter(-1, indices, values)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:60]
