"""Every mismatch between teacher, student and data is named before training."""

import pytest
import torch
from torch import nn

import kdlib as kd

CLASSES = ("cat", "dog", "car", "ship")


class Oracle(nn.Module):
    """Reads the class from the first pixel; ``order`` says where it puts each class."""

    def __init__(self, classes=4, order=None, scale=5.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.classes, self.order = classes, order or list(range(classes))

    def forward(self, x):
        right = (x[:, 0, 0, 0] * 2 + 1.5).round().long()
        return self.weight * torch.eye(self.classes)[torch.tensor(self.order)[right]]


def batch(n=128):
    y = torch.arange(n) % 4
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = (y - 1.5) / 2
    return {"x": x, "y": y, "id": torch.arange(n)}


def report(model=None, student=None, data=None, names=CLASSES, classes=CLASSES):
    teacher = kd.Teacher(model or Oracle(), name="t", classes=names)
    return kd.check_contract(teacher, student or kd.models.small_cnn(4), data or batch(), classes=classes)


def test_a_good_match_has_nothing_to_say():
    found = report()
    assert found.ok, str(found)
    assert "✗" not in str(found)


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda: report(student=kd.models.small_cnn(7)), "teacher 4, student 7"),
        (lambda: report(names=("dog", "cat", "car", "ship")), "class 0 is 'dog' for the teacher and 'cat' in the data"),
        (lambda: report(names=("cat", "dog", "car", "boat")), "only one of the two has ['boat', 'ship']"),
        (lambda: report(Oracle(order=[1, 2, 3, 0])), "permuted"),
        (lambda: report(Oracle(scale=float("nan"))), "NaN or infinity"),
        (lambda: report(data={**batch(), "x": 255 * batch()["x"].abs()}), "divide by 255"),
        (lambda: report(nn.Sequential(nn.Flatten(), nn.Linear(48, 4))), "the teacher runs on a batch"),
        (lambda: report(data={**batch(), "y": batch()["y"] + 3}), "to 6"),
    ],
)  # fmt: skip
def test_each_mismatch_is_named(broken, said):
    found = broken()
    assert not found.ok and said in str(found), str(found)


def test_all_mismatches_are_named_at_once():
    text = str(
        report(
            student=kd.models.small_cnn(7),
            names=("dog", "cat", "car", "ship"),
            data={**batch(), "x": 255 * batch()["x"].abs()},
        )
    )
    assert text.count("✗") >= 3


def test_a_foreign_tokenizer():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            return self.head(self.words(input_ids).mean(1))

    teacher = kd.Teacher(Bag(), name="t", inputs=lambda b: {k: b[k] for k in ("input_ids", "attention_mask")})
    ids = torch.full((4, 3), 12)
    found = kd.check_contract(
        teacher,
        Bag(),
        {"input_ids": ids, "attention_mask": ids, "y": torch.zeros(4, dtype=torch.int64), "id": torch.arange(4)},
    )
    assert "the batch has id 12" in str(found)


def test_the_student_keeps_its_mode():
    student = kd.models.small_cnn(4).train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    report(student=student)
    assert student.training and all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


class Bag(nn.Module):
    """Mean of word vectors; notes whether it was run."""

    def __init__(self, words):
        super().__init__()
        self.words, self.head, self.asked = nn.Embedding(words, 4), nn.Linear(4, 2), False

    def forward(self, input_ids, attention_mask):
        self.asked = True
        return self.head(self.words(input_ids).mean(1))


@pytest.mark.parametrize("teacher_words, student_words, who", [(10, 20, "the teacher"), (20, 10, "the student")])
def test_a_model_is_not_run_on_ids_outside_its_vocabulary(teacher_words, student_words, who):
    teacher, student, ids = Bag(teacher_words), Bag(student_words), torch.full((4, 3), 12)
    wrapped = kd.Teacher(teacher, name="t", inputs=lambda b: {k: b[k] for k in ("input_ids", "attention_mask")})
    text = {"input_ids": ids, "attention_mask": ids, "y": torch.zeros(4, dtype=torch.int64), "id": torch.arange(4)}
    found = kd.check_contract(wrapped, student, text)
    assert not found.ok and f"inside the vocabulary of {who} (10)" in str(found) and "the batch has id 12" in str(found)
    assert (teacher.asked, student.asked) == (teacher_words > 12, student_words > 12)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Oracle()

    def forward(self, x):
        return self.inner(x), x


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return None


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda: report(Pair()), "answers a tuple"),
        (lambda: report(student=Nothing()), "the student answers a NoneType"),
        (lambda: report(nn.Bilinear(3, 3, 4)), "TypeError"),
        (lambda: report(data={**batch(), "y": batch()["y"] - 100}), "from -100"),
    ],
)
def test_whatever_a_stranger_raises_is_a_finding(broken, said):
    found = broken()
    assert not found.ok and said in str(found), str(found)
    assert "inputs look normalised" in str(found)  # the report went on


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Oracle()

    def forward(self, x):
        return self.inner(x).softmax(-1)


class TwoTables(nn.Module):
    """Word vectors beside a larger table of positions, as in BERT."""

    def __init__(self):
        super().__init__()
        self.positions, self.words, self.head = nn.Embedding(512, 4), nn.Embedding(300, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.words(input_ids).mean(1))


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda: report(Softmaxed()), "ends in a softmax"),
        (lambda: report(Oracle(order=[1, 0, 2, 3])), "permuted"),  # two classes swapped: right half of the time
        (lambda: report(data={**batch(), "x": batch()["x"].abs() / 4}), "divide by 255"),
        (lambda: report(data={**batch(), "y": nn.functional.one_hot(batch()["y"])}), "labels have the shape [128, 4]"),
    ],
    ids=["softmax", "swapped", "pixels in [0, 1]", "multi-hot"],
)
def test_what_looks_right_at_first_is_flagged(broken, said):
    found = broken()
    assert not found.ok and said in str(found), str(found)


def test_a_table_of_positions_is_not_the_vocabulary():
    text = {"input_ids": torch.full((4, 3), 499), "attention_mask": torch.ones(4, 3), "id": torch.arange(4)}
    wrapped = kd.Teacher(TwoTables(), name="t", inputs=lambda b: {k: b[k] for k in ("input_ids", "attention_mask")})
    found = kd.check_contract(wrapped, TwoTables(), text)
    assert "inside the vocabulary of the teacher (300)" in str(found) and not found.ok
