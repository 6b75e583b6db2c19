"""Teachers: a model that stays as it is, or its answers kept on disk. A method cannot tell which it was given.

``teacher(batch)`` returns logits [B, C] in fp32, without gradients. :class:`Teacher` runs a model;
:class:`CachedTeacher` looks the answers up by the batch's sample ids and views.
"""

from __future__ import annotations

import hashlib
import json
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
        self._watch()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32, without gradients.

        Raises:
            RuntimeError: somebody put the model in training mode, or changed its weights or buffers.
            TypeError: the model answers something else than logits.
        """
        self._look()
        arguments = self.inputs(batch)
        where = next((p.device for p in self.model.parameters()), None)
        if isinstance(arguments, dict):
            out = self.model(**{k: _to(v, where) for k, v in arguments.items()})
        else:
            out = self.model(*(_to(v, where) for v in arguments))
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"teacher {self.name!r} answers a {type(out).__name__}, not logits; wrap its model so that forward "
                "returns a tensor, or an object with .logits"
            )
        return logits.float()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation mode whatever is asked."""
        return self

    def eval(self) -> Teacher:
        return self

    def check(self) -> None:
        """Raise RuntimeError unless the model is as it was wrapped: evaluation mode, same weights, no gradients.

        Once the fingerprint is known the weights themselves are compared, not only torch's counters of changes,
        which do not see a write through ``.data``.
        """
        self._look()
        if "fingerprint" in vars(self) and fingerprint(self.model, self.inputs) != self.fingerprint:
            raise RuntimeError(self._changed())

    def _look(self) -> None:
        """The part of :meth:`check` that is cheap enough for every call."""
        if self._state() == self._mark:
            return
        if any(module.training for module in self.model.modules()):
            raise RuntimeError(
                f"teacher {self.name!r} was put in training mode: dropout and batch-norm would change its answers. "
                "Do not call .train() on its model; if it is part of a larger module, keep it out of there"
            )
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RuntimeError(f"a parameter of teacher {self.name!r} takes gradients; leave requires_grad off")
        raise RuntimeError(self._changed())

    def _changed(self) -> str:
        return f"the weights or buffers of teacher {self.name!r} were changed; wrap the new model anew"

    def _watch(self) -> None:
        self._parts = list(self.model.modules())
        self._mark = self._state()

    def _state(self) -> list[Any]:
        """What must stay: modes, which modules and tensors there are, and torch's counters of changes in place."""
        state: list[Any] = []
        for module in self._parts:
            state += (module.training, *map(id, module._modules.values()))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    state += (id(tensor), tensor._version, tensor.requires_grad)
        return state

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # a copy starts counting anew, so it must not start from a changed model
        return {name: value for name, value in vars(self).items() if name not in ("_mark", "_parts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._watch()

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
        self.views, self._classes = list(card["views"]), card["vocabulary"]
        # Row of view v and position n: v * N + n. Top-k answers stay sparse; a batch's are filled up when asked for.
        self._answers = {name: tensor.flatten(0, 1) for name, tensor in answers.items()}
        # [view, id] -> row, with a border of -1 all round: what lies outside is clamped into it.
        self._first, span = int(ids.min()) - 1, _span(ids)
        self._row = torch.full((max(self.views) + 3, span + 2), -1)
        for number, view in enumerate(self.views):
            self._row[view + 1, ids - self._first] = torch.arange(len(ids)) + number * len(ids)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32, on the device of ``batch["id"]``.

        Of a top-k pack these are log-probabilities: the softmax is the teacher's, the logits' own offset is gone.

        Raises:
            ValueError: an id or a view that the teacher was not asked about.
        """
        ids, view = batch["id"], batch.get("view")
        if ids.device != self._row.device:
            self._row = self._row.to(ids.device)
            self._answers = {name: tensor.to(ids.device) for name, tensor in self._answers.items()}
        views, span = (len(n) for n in (self._row, self._row[0]))
        at = (ids - self._first).clamp(0, span - 1)
        rows = self._row[1, at] if view is None else self._row[(view + 1).clamp(0, views - 1), at]
        answer = self._look_up(rows)
        unknown = rows < 0
        if ids.is_cuda:  # to look here would make every step wait for the GPU: NaN stops the run at the epoch's end
            return answer.masked_fill(unknown.unsqueeze(-1), float("nan"))
        if unknown.any():
            self._refuse(ids, view if view is not None else torch.zeros_like(ids))
        return answer

    def _look_up(self, rows: Tensor) -> Tensor:
        found = {name: tensor[rows] for name, tensor in self._answers.items()}  # row -1 is the caller's to refuse
        return _whole(found, self._classes)

    def _refuse(self, ids: Tensor, views: Tensor) -> None:
        strangers = ids[~torch.isin(ids, self.ids.to(ids.device))]
        if len(strangers):
            raise ValueError(
                f"teacher {self.name!r} was never asked about id {int(strangers[0])} ({len(strangers)} such in this "
                f"batch); its pack was made for {self.card['data']!r}. Cache it for the data you train on"
            )
        odd = views[~torch.isin(views, torch.tensor(self.views, device=views.device))]
        raise ValueError(
            f"teacher {self.name!r} has views {self.views}, the batch asks for view {int(odd[0])}; "
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
            ValueError: pack or card is damaged or was edited, or it was made for other data.
        """
        folder = Path(folder)
        if not (folder / CARD).exists() or not (folder / PACK).exists():
            raise FileNotFoundError(f"{folder} is no pack of teacher's answers: it needs {CARD} and {PACK}")
        card = _read_card(folder / CARD)
        if files.sha256(folder / PACK) != card["sha256"]:
            raise ValueError(
                f"{folder / PACK} is not the file that its card describes (checksum differs); copy it again"
            )
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
        ValueError: ``data`` is augmented at random, its ids repeat or lie far apart, ``top_k`` is below 1, or an
            answer is NaN, infinite or too large for ``dtype``.
        RuntimeError: the teacher is not as it was wrapped.
        OSError: the disk is full; nothing is left behind.
    """
    _check_data(data, views)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; keep at least 1 logit of each row, or leave it out to keep all")
    teacher.check()
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
    except (ValueError, OSError) as error:
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
    parts: dict[str, list[Tensor]] = {}
    for view in views:
        for name, tensor in _answers_of(teacher, data, view, top_k, dtype).items():
            parts.setdefault(name, []).append(tensor)
    labels, classes = parts.pop("y", None), int(parts.pop("classes")[0])
    answers = {name: torch.stack(tensors) for name, tensors in parts.items()}  # [V, N, ...]
    ids = data.ids.sort().values
    (folder / CARD).unlink(missing_ok=True)  # never a new pack under an old card
    files.write_tensors(folder / PACK, {"ids": ids, **answers})
    first = {name: tensor[0] for name, tensor in answers.items()}
    card = {
        "teacher": teacher.name, "data": getattr(data, "name", type(data).__name__), "examples": len(ids),
        "views": list(views), "vocabulary": classes, "classes": list(teacher.classes) if teacher.classes else None,
        **(_quality(_whole(first, classes), labels[0]) if labels else {}),
        "top_k": top_k, "dtype": str(dtype).removeprefix("torch."),
        "computed in": scale.precision().replace("no", "fp32"),
        "licence": licence or "that of the data and the teacher's weights", "made": date.today().isoformat(),
        "torch": str(torch.__version__), "data_fingerprint": data.fingerprint, "fingerprint": key,
        "sha256": files.sha256(folder / PACK),
    }  # fmt: skip
    try:
        files.write_json(folder / CARD, card | {"seal": _seal(card)})
    except BaseException:
        (folder / PACK).unlink()  # a pack without its card is of no use, and here the disk may be full
        raise
    return CachedTeacher.load(folder)


def _check_data(data: Any, views: Sequence[int]) -> None:
    """Raise ValueError unless every example can be found again and looks the same each time."""
    remedy = "pass the data set itself and name the views: cache_teacher(teacher, data_set, views=(0, 1))"
    if not hasattr(data, "view_batches") or getattr(data, "augment", None):
        raise ValueError(
            f"a {type(data).__name__} is augmented or shuffled as it is read, so answers for it cannot be kept; "
            f"{remedy}"
        )
    if len(data.ids.unique()) != len(data.ids):
        raise ValueError(
            "ids repeat in the data, so an answer could belong to two examples; give every example its own id"
        )
    if (span := _span(data.ids)) > 1_000 * len(data.ids) + 10_000_000:
        raise ValueError(f"{len(data.ids)} ids are spread over {span:,} numbers; use the row in the original set as id")
    for view in views:
        first, again = (next(iter(data.view_batches(view))) for _ in range(2))
        odd = [k for k, v in first.items() if isinstance(v, Tensor) and not torch.equal(v, again[k])]
        if odd:
            raise ValueError(
                f"view {view} of the data has another {odd[0]!r} each time it is read: random augmentation; {remedy}"
            )


def _span(ids: Tensor) -> int:
    return int(ids.max()) - int(ids.min()) + 1


def _answers_of(teacher: Teacher, data: Any, view: int, top_k: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """One view's answers and labels, in the order of the ids, whatever the order that the data are read in."""
    parts: dict[str, list[Tensor]] = {"id": []}
    for batch in data.view_batches(view):
        if "view" in batch and (batch["view"] != view).any():
            raise ValueError(f"asked for view {view}, the data gave others; mend view_batches of {type(data).__name__}")
        logits = teacher(batch).cpu()
        if logits.isnan().any() or logits.isposinf().any():
            raise ValueError(
                f"teacher {teacher.name!r} answers NaN or infinity; look at its input (normalisation, fp16 overflow)"
            )
        kept = _top(logits, top_k, dtype) if top_k else {"logits": logits.to(dtype)}
        if "logits" in kept and (kept["logits"].isinf() & logits.isfinite()).any():
            raise ValueError(f"logits up to {logits.abs().max():.3g} do not fit into {dtype}; keep them in a wider one")
        labels = {"y": batch["y"].cpu()} if "y" in batch else {}
        for name, tensor in {"id": batch["id"].cpu(), **kept, **labels}.items():
            parts.setdefault(name, []).append(tensor)
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    ids, order = whole.pop("id").sort()
    if not torch.equal(ids, data.ids.sort().values):
        raise ValueError(f"view {view} of the data gave {len(ids)} examples, not each of its {len(data.ids)} ids once")
    return {name: tensor[order] for name, tensor in whole.items()} | {"classes": torch.tensor(logits.shape[-1])}


def _seal(card: dict[str, Any]) -> str:
    """Of what the card says; plain JSON, so that later versions of kdlib still read a pack that was handed on."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = files.read_json(path)
    except ValueError:
        card = None
    if not isinstance(card, dict) or card.pop("seal", None) != _seal(card):
        raise ValueError(f"{path} is damaged or was edited; copy the pack again, or ask the teacher again")
    return card


def _quality(logits: Tensor, labels: Tensor) -> dict[str, float]:
    if labels.is_floating_point():
        return {}
    from kdlib import metrics

    confidence = logits.softmax(-1).max(-1).values.mean().item()
    values = {
        "accuracy": metrics.accuracy(logits, labels),
        "ece": metrics.ece(logits, labels),
        "confidence": confidence,
    }
    return {name: round(value, 4) for name, value in values.items()}


def _top(logits: Tensor, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The k largest log-probabilities of each row; what is left over belongs to the other classes evenly."""
    log_p = logits.log_softmax(-1)
    values, indices = log_p.topk(min(k, logits.shape[-1]))
    return {"values": values.to(dtype), "indices": indices.to(torch.int32)}


def _whole(answers: dict[str, Tensor], classes: int) -> Tensor:
    return answers["logits"].float() if "logits" in answers else _dense(answers, classes)


def _dense(answers: dict[str, Tensor], classes: int) -> Tensor:
    values, indices = answers["values"].float(), answers["indices"].long()
    others = classes - values.shape[-1]
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-12) / max(others, 1)
    return rest.log().expand(*values.shape[:-1], classes).scatter(-1, indices, values)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:60]
