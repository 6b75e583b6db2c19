"""Teachers: a model that stays as it is, or its answers kept on disk. A method cannot tell which it was given.

``teacher(batch)`` returns logits [B, C] in fp32, without gradients. :class:`Teacher` runs a model;
:class:`CachedTeacher` looks the answers up by the batch's sample ids and views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import files, metrics, scale
from kdlib.fingerprint import fingerprint

PACK, CARD = "pack.safetensors", "card.json"
REMEDY = "pass the data set itself, not its batches, and name the views: cache_teacher(teacher, data, views=(0, 1))"


class Teacher:
    """A frozen model. It is no ``nn.Module``, so a student that holds it does not inherit its parameters.

    Args:
        model: put in evaluation mode, its parameters frozen; stays on its device and in its precision.
        name: for cards and messages.
        inputs: what the model is called with, from a batch: a tuple (positional) or a dict (keywords).
        classes: class names in the order of the logits.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """

    def __init__(
        self, model: nn.Module, *, name: str,
        inputs: Callable[[dict], Any] = metrics.given, classes: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"teacher {name!r} is a {type(model).__name__}; wrap it as an nn.Module that calls it")
        self.model, self.name, self.inputs, self.classes = model, name, inputs, classes and tuple(classes)
        self._hidden = _hidden(model)
        for root in self._roots():
            root.eval().requires_grad_(False)
        self._mark = self._state()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32.

        Raises:
            RuntimeError: its model is in training mode, takes gradients, or has other weights or buffers than it had.
            TypeError: the model answers something else than logits.
        """
        if self._state() != self._mark:
            raise RuntimeError(self._objection())
        logits = metrics.forward(self.model, batch, self.inputs)
        if not isinstance(logits, Tensor):
            found = f"teacher {self.name!r} answers a {type(logits).__name__}"
            raise TypeError(f"{found}; wrap its model so that forward returns a tensor, or an object with .logits")
        return logits.float()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation mode whatever is asked."""
        return self

    def _roots(self) -> list[nn.Module]:
        return [self.model, *(held for held in self._hidden if isinstance(held, nn.Module))]

    def _state(self) -> list[Any]:
        """What must stay: modes, and torch's counters of changes in place."""
        roots = self._roots()
        tensors = [t for root in roots for t in (*root.parameters(), *root.buffers())]
        tensors += [held for held in self._hidden if isinstance(held, Tensor)]
        modes = [module.training for root in roots for module in root.modules()]
        return modes + [(id(t), t._version, t.requires_grad) for t in tensors]

    def _objection(self) -> str:
        if any(module.training for root in self._roots() for module in root.modules()):
            return f"teacher {self.name!r} was put in training mode: keep its model out of modules that are trained"
        return f"weights or buffers of teacher {self.name!r} were changed, or take gradients; wrap the new model anew"

    def __getstate__(self) -> dict[str, Any]:
        if self._state() != self._mark:  # a copy starts counting anew, so it must not start from a changed model
            raise RuntimeError(self._objection())
        return {name: value for name, value in vars(self).items() if name != "_mark"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._mark = self._state()

    @property
    def fingerprint(self) -> str:
        """Of weights, architecture and inputs, as they are now: writes through ``.data`` show here."""
        return fingerprint(self.model, self.inputs)


def _hidden(model: nn.Module) -> list[nn.Module | Tensor]:
    """Modules and tensors that a model keeps in plain attributes, lists and dictionaries, where torch overlooks them."""
    known, found = {id(module) for module in model.modules()}, []
    torchs = set(vars(nn.Module()))  # parameters, buffers, modules and hooks, which torch does see
    todo = [item for m in model.modules() for name, item in vars(m).items() if name not in torchs]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, tuple, set)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (Tensor, nn.Module)) and id(item) not in known:
            known.add(id(item))
            found += [item, *(_hidden(item) if isinstance(item, nn.Module) else ())]
    return found


class CachedTeacher:
    """A teacher's answers, found by ``batch["id"]`` and ``batch["view"]`` (0 where a batch has none)."""

    def __init__(self, ids: Tensor, logits: Tensor, card: dict[str, Any], folder: Path) -> None:
        self.ids, self.logits, self.card, self.folder = ids, logits, card, folder  # ids sorted, logits [V, N, C]
        self.name, self.fingerprint = card["teacher"], card["fingerprint"]
        self.classes = card["classes"] and tuple(card["classes"])

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C], fp32, on the device of ``batch["id"]``.

        Raises:
            ValueError: an id or a view that the teacher was not asked about.
        """
        ids, views = batch["id"], batch.get("view", torch.zeros_like(batch["id"]))
        self.ids, self.logits = self.ids.to(ids.device), self.logits.to(ids.device)
        rows = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        asked = torch.tensor(self.card["views"], device=ids.device)
        view = (views[:, None] == asked).int().argmax(1)
        known = (self.ids[rows] == ids) & (asked[view] == views)
        answer = self.logits[view, rows].float()
        if ids.is_cuda:  # to look here would make every step wait for the GPU: NaN stops the run at the epoch's end
            return answer.masked_fill(~known[:, None], torch.nan)
        if not known.all():
            stranger = int((~known).int().argmax())
            asked = f"was never asked about id {int(ids[stranger])} in view {int(views[stranger])}"
            pack = f"its pack is of {self.card['data']!r}, views {self.card['views']}"
            remedy = "cache what you train on, with its views (flip=True: views=(0, 1))"
            raise ValueError(f"teacher {self.name!r} {asked}: {pack}; {remedy}")
        return answer

    @classmethod
    def load(cls, folder: str | Path, data: Any) -> CachedTeacher:
        """Read a pack, also one that was handed on, for the ``data`` that it is about.

        Raises:
            FileNotFoundError: no pack there.
            ValueError: it is not the file that its card describes, or about other data: ids alone would not tell.
        """
        folder = Path(folder)
        if not (folder / CARD).exists():
            raise FileNotFoundError(f"{folder} is no pack of teacher's answers: it needs {CARD} and {PACK}")
        card = files.read_json(folder / CARD)
        if not isinstance(card, dict) or files.sha256(folder / PACK) != card.get("sha256"):
            raise ValueError(f"{folder / PACK} is not what its card describes (checksum differs); copy it again")
        if data.fingerprint != card["about"]:
            found = f"{folder} holds answers about {card['data']!r}, and not about these {len(data.ids)} examples"
            raise ValueError(f"{found}; give the set that it was made for, and take your part of it afterwards")
        tensors = files.read_tensors(folder / PACK)
        return cls(tensors["ids"], tensors["logits"], card, folder)


def cache_teacher(teacher: Teacher, data: Any, *, views: Sequence[int] = (0,)) -> CachedTeacher:
    """Ask ``teacher`` once about every example and view of ``data``, and keep the answers with a card.

    A pack made before is used if data, weights, views and precision are the same. Two processes make it once.

    Args:
        teacher: the live teacher.
        data: with ``ids`` [N], ``fingerprint`` and ``view_batches(view)``: an image or text set, not its batches.
        views: which deterministic views of the data (1 is the mirror image).

    Raises:
        ValueError: ``data`` cannot be asked about again, or an answer is NaN or infinite.
    """
    if not hasattr(data, "view_batches") or len(data.ids.unique()) < len(data.ids):
        found = f"answers about a {type(data).__name__} cannot be kept"
        raise ValueError(f"{found}: {REMEDY}, each example with an id of its own")
    key = fingerprint(teacher.fingerprint, data.fingerprint, list(views), scale.precision())
    folder = files.home() / "teachers" / f"{files.slug(teacher.name)}-{key[:12]}"
    with files.lock(folder):
        if (folder / CARD).exists():
            try:
                return CachedTeacher.load(folder, data)
            except (ValueError, OSError) as error:
                print(f"the teacher is asked again: {error}")
        return _ask(teacher, data, views, folder, key)


def _ask(teacher: Teacher, data: Any, views: Sequence[int], folder: Path, key: str) -> CachedTeacher:
    ids, answers = data.ids.sort().values, [_answers(teacher, data, view) for view in views]
    card = {
        "teacher": teacher.name, "classes": teacher.classes, "data": getattr(data, "name", type(data).__name__),
        "examples": len(ids), "views": list(views), **_quality(answers[0], data), "made": date.today().isoformat(),
        "computed in": scale.precision().replace("no", "fp32"), "fingerprint": key, "about": data.fingerprint,
    }  # fmt: skip
    try:
        files.write_tensors(folder / PACK, {"ids": ids, "logits": torch.stack(answers)})
        files.write_json(folder / CARD, {**card, "sha256": files.sha256(folder / PACK)})  # last: whole or not there
    except OSError:
        (folder / PACK).unlink(missing_ok=True)
        raise
    return CachedTeacher.load(folder, data)


def _answers(teacher: Teacher, data: Any, view: int) -> Tensor:
    """Logits [N, C] about one view of the data, in the order of its sorted ids."""
    first, again = (next(iter(data.view_batches(view))) for _ in range(2))
    same = all(torch.equal(value, again[name]) for name, value in first.items() if isinstance(value, Tensor))
    if not same or (first.get("view", torch.tensor(view)) != view).any():
        raise ValueError(f"view {view} of the data is another one each time it is read, or not that view: {REMEDY}")
    rows = [(batch["id"].cpu(), teacher(batch).cpu()) for batch in data.view_batches(view)]
    ids, logits = (torch.cat(column) for column in zip(*rows, strict=True))
    if not torch.equal(ids.sort().values, data.ids.sort().values):
        found = f"view {view} of the data gave {len(ids)} examples, not each of its {len(data.ids)} ids once"
        raise ValueError(f"{found}: {REMEDY}")
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError(f"teacher {teacher.name!r} answers NaN or infinity; look at its input and at fp16 overflow")
    return logits[ids.argsort()]


def _quality(logits: Tensor, data: Any) -> dict[str, float]:
    """Accuracy and mean confidence of answers about labelled classes, for the card."""
    labels = getattr(data, "labels", None)
    if labels is None or labels.is_floating_point() or logits.shape[-1] < 2:
        return {}
    labels, sure = labels[data.ids.argsort()], float(logits.softmax(-1).amax(-1).mean())
    found = {"accuracy": metrics.accuracy(logits, labels), "confidence": sure}
    return {name: round(value, 4) for name, value in found.items()}
