"""Losses that several notebooks share. Each is one pure function of logits, computed in fp32.

Conventions, the same everywhere (derived in notebook 00): the teacher's distribution weights the KL divergence,
classes are summed and examples (or valid tokens) averaged, the factor T² is always there, and ``alpha`` weights
the teacher. Sources: Hinton et al. 2015 (arXiv:1503.02531), Agarwal et al. 2023 (GKD, arXiv:2306.13649).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student) of softened distributions, mean over examples (Hinton et al. 2015, § 2).

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C], without gradient. An entry of -inf (a masked class) has probability 0.
        temperature: T > 0, for both.

    Returns:
        A scalar, 0 where the distributions are equal. Its gradient is T (softmax(z_s / T) - softmax(z_t / T)) / N.

    Raises:
        ValueError: shapes differ, T is not positive and finite, logits are not floating point, the teacher's logits
            take gradients (the usual sign of swapped arguments) or, on the CPU, hold NaN.
    """
    _check(student_logits, teacher_logits, temperature)
    return _mean(temperature**2 * _kl(student_logits, teacher_logits, temperature))


def hinton_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """``alpha`` * :func:`kd_loss` + (1 - ``alpha``) * cross-entropy with ``labels`` [N] (int64).

    Raises:
        ValueError: as :func:`kd_loss`, or ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it weights the teacher and must lie in [0, 1]")
    soft = kd_loss(student_logits, teacher_logits, temperature=temperature)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits.float(), labels)


def token_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """:func:`kd_loss` averaged over the tokens where ``mask`` [B, L] is true; logits are [B, L, V].

    Rows are selected before the softmax, so padding costs nothing and can hold anything. Without a single valid
    token the loss is 0, with its graph intact.

    Raises:
        ValueError: as :func:`kd_loss`, or the mask's shape is not that of the logits without the last axis.
    """
    student_logits, teacher_logits = _select(student_logits, teacher_logits, mask)
    if not len(student_logits):
        return student_logits.sum()
    return kd_loss(student_logits, teacher_logits, temperature=temperature)


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared distance ‖z_s - z_t‖² of logits [N, C]: summed over classes, mean over examples.

    This is C times ``F.mse_loss``, which also averages over the classes.

    Raises:
        ValueError: shapes differ, or the teacher's logits take gradients.
    """
    _check(student_logits, teacher_logits, 1.0)
    return _mean((student_logits.float() - teacher_logits.float()).square().sum(-1))


def reverse_kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² KL(student ‖ teacher), mean over examples: the mode-seeking direction.

    Computed in log space, so that gradients stay finite where probabilities underflow. A class that the teacher
    forbids (-inf) counts with a log-probability of -1e30, so that the loss is huge but finite.

    Raises:
        ValueError: as :func:`kd_loss`.
    """
    _check(student_logits, teacher_logits, temperature)
    student_log = _log_softmax(student_logits, temperature)
    teacher_log = _finite(_log_softmax(teacher_logits, temperature))
    return _mean(temperature**2 * (student_log.exp() * (_finite(student_log) - teacher_log)).sum(-1))


def generalized_jsd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T² [beta KL(p_T ‖ m) + (1 - beta) KL(p_S ‖ m)] with m = beta p_T + (1 - beta) p_S (Agarwal et al. 2023).

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C], without gradient.
        beta: in (0, 1). Divided by beta, the limit beta -> 0 is :func:`kd_loss`; divided by 1 - beta, the limit
            beta -> 1 is :func:`reverse_kl_loss`. The loss itself goes to 0 at both ends.
        temperature: T > 0.
        mask: [...] true where a token counts; all by default.

    Raises:
        ValueError: as :func:`kd_loss`, or ``beta`` is not inside (0, 1).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; it must lie inside (0, 1). Its limits are kd_loss (0) and reverse_kl_loss (1)")
    if mask is not None:
        student_logits, teacher_logits = _select(student_logits, teacher_logits, mask)
        if not len(student_logits):
            return student_logits.sum()
    _check(student_logits, teacher_logits, temperature)
    student_log, teacher_log = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    student_log, teacher_log = _finite(student_log), _finite(teacher_log)
    mixture_log = torch.logaddexp(teacher_log + math.log(beta), student_log + math.log1p(-beta))
    from_teacher = (teacher_log.exp() * (teacher_log - mixture_log)).sum(-1)
    from_student = (student_log.exp() * (student_log - mixture_log)).sum(-1)
    return _mean(temperature**2 * (beta * from_teacher + (1 - beta) * from_student))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(-1)


def _kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) per row. With probabilities as the target, kl_div takes 0 log 0 as 0."""
    teacher = (teacher_logits.float() / temperature).softmax(-1)
    return F.kl_div(_log_softmax(student_logits, temperature), teacher, reduction="none").sum(-1)


def _finite(log_probabilities: Tensor) -> Tensor:
    """-inf times a probability of 0 would be NaN; a very small number times 0 is 0."""
    return log_probabilities.clamp(min=-1e30)


def _mean(rows: Tensor) -> Tensor:
    """Mean over rows; 0 with its graph intact where there are none."""
    return rows.mean() if rows.numel() else rows.sum()


def _select(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(student_logits, teacher_logits)
    if mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, the logits {tuple(student_logits.shape)}; "
            "the mask needs the logits' shape without the last axis, true where a token counts"
        )
    keep = mask.bool()
    return student_logits[keep], teacher_logits[keep]


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape == teacher_logits.shape:
        return
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if student and teacher and student[-1] != teacher[-1]:
        raise ValueError(
            f"the student has {student[-1]} classes and the teacher {teacher[-1]}; both must share one label set or "
            "vocabulary (for vocabularies that differ only by padding rows, cut both to the shorter)"
        )
    raise ValueError(f"student logits have shape {student}, teacher logits {teacher}; they must be equal")


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    _check_shapes(student_logits, teacher_logits)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite (1 leaves the logits as they are)")
    if not (student_logits.is_floating_point() and teacher_logits.is_floating_point()):
        raise ValueError(
            f"logits are {student_logits.dtype} and {teacher_logits.dtype}; pass floating-point logits, not labels"
        )
    if teacher_logits.requires_grad:
        raise ValueError(
            "the teacher's logits take gradients: are the arguments swapped? It is (student_logits, teacher_logits); "
            "a teacher wrapped in kd.Teacher gives logits without gradients"
        )
    # on a GPU this look would make every step wait for the device; fit() finds a NaN loss there
    if teacher_logits.device.type == "cpu" and math.isnan(teacher_logits.detach().max() if teacher_logits.numel() else 0):
        raise ValueError("the teacher's logits hold NaN; look at the teacher's input (normalisation, fp16 overflow)")
