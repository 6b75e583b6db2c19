"""What made a result, as one hash: it changes with all that acts, and with nothing else."""

import copy
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib.fingerprint import fingerprint
from kdlib.scale import Settings

BASE = '''
import functools, threading
from dataclasses import dataclass
import torch
from torch import nn
import kdlib as kd
from kdlib.scale import Settings

run = Settings(scale="smoke", seeds=[0], jobs=1, epochs=3, unread=1)
FACTOR = 2.0
lock = threading.Lock()

def deep(x):
    return x * FACTOR

def helper(x, shift=1):
    """Says something."""
    return deep(x) + shift  # a comment

def forth(n):
    return back(n - 1) if n else 0

def back(n):
    return forth(n)

def traced(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner

@traced
def decorated(x):
    return x + 10

class Parent(nn.Module):
    def size(self):
        return 4

class Net(Parent):
    def forward(self, x):
        return x * self.size()

@dataclass
class Plain:
    width: int = 3

def made(power):
    def inner(x):
        return x ** power
    return inner

cube = made(3)

def train(seed, folder, rate=0.1):
    forth(seed)
    lock = "a local of the same name as a global lock"
    net, plain = Net(), Plain()
    return kd.losses.kd_loss, run.epochs, helper(rate), decorated(1), cube(2), (lambda x: x + 1)(1)
'''


def hashed(folder, text):
    """The fingerprint of ``train`` in a script that really is __main__."""
    script = folder / "script.py"
    end = "\nfrom kdlib.fingerprint import fingerprint\nprint(fingerprint(train))\n"
    script.write_text(text + end)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """The same script imported under many texts in one process: fast, and by the path of ordinary files."""
    import importlib.util

    count = iter(range(1000))

    def load(text):
        name = f"chapter_{next(count)}"
        path = tmp_path_factory.mktemp("chapters") / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


ACTS = {
    "a constant of a helper's helper": ("FACTOR = 2.0", "FACTOR = 3.0"),
    "a helper": ("deep(x) + shift", "deep(x) - shift"),
    "a helper's default": ("shift=1", "shift=2"),
    "its own default": ("rate=0.1", "rate=0.2"),
    "a setting that is read": ("epochs=3", "epochs=4"),
    "one of two functions that call each other": ("return forth(n)", "return forth(n) + 1"),
    "what is under a decorator": ("x + 10", "x + 11"),
    "the decorator": ("return function(*args)", "return -function(*args)"),
    "a method": ("x * self.size()", "x + self.size()"),
    "a method of the parent class": ("return 4", "return 5"),
    "a dataclass's default": ("width: int = 3", "width: int = 4"),
    "a closure's value": ("cube = made(3)", "cube = made(4)"),
    "a closure's code": ("x ** power", "x * power"),
    "a lambda": ("lambda x: x + 1", "lambda x: x + 2"),
    "which of kdlib's functions": ("kd.losses.kd_loss", "kd.losses.reverse_kl_loss"),
}
DOES_NOT = {
    "a comment": ("# a comment", "# another"),
    "a docstring": ('"""Says something."""', '"""Says it better."""'),
    "an annotation": ("def deep(x)", "def deep(x: float) -> float"),
    "layout": ("return x * FACTOR", "return (\n        x * FACTOR\n    )"),
    "a setting that is not read": ("unread=1", "unread=2"),
    "seeds and jobs": ("seeds=[0], jobs=1", "seeds=[0, 1], jobs=2"),
    "a global that is not reached": ("FACTOR = 2.0", "FACTOR = 2.0\nOTHER = 7"),
}


def key(module):
    """Of the function as if the module had one name: only the text differs."""
    return fingerprint(module.train)


@pytest.mark.parametrize("what", ACTS)
def test_what_acts_changes_it(in_process, what):
    before, after = ACTS[what]
    assert before in BASE
    assert key(in_process(BASE)) != key(in_process(BASE.replace(before, after)))


@pytest.mark.parametrize("what", DOES_NOT)
def test_what_does_not_act_leaves_it(in_process, what):
    before, after = DOES_NOT[what]
    assert before in BASE
    assert key(in_process(BASE)) == key(in_process(BASE.replace(before, after)))


def test_a_script_agrees_with_itself_and_sees_a_change(tmp_path):
    first = hashed(tmp_path, BASE)
    assert first == hashed(tmp_path, BASE.replace("# a comment", ""))
    assert first != hashed(tmp_path, BASE.replace("FACTOR = 2.0", "FACTOR = 2.5"))


def test_two_lambdas_on_a_line_are_told_apart(in_process):
    module = in_process("f, g = lambda x: x, lambda x: -x\n")
    assert fingerprint(module.f) != fingerprint(module.g)


def test_settings_handed_on_whole_count_whole_but_for_where_runs_are_made(in_process):
    text = "from kdlib.scale import Settings\nrun = Settings(scale='lab', seeds=[1], jobs=1, a=1)\n"
    text += "def train():\n    return other(run)\ndef other(s):\n    return s\n"
    first = key(in_process(text))
    assert first == key(in_process(text.replace("seeds=[1], jobs=1", "seeds=[2], jobs=4")))
    assert first != key(in_process(text.replace("a=1", "a=2")))


def test_imports_inside_a_function_are_followed(in_process):
    text = "def train():\n    from kdlib import losses\n    return losses.{}\n"
    loss = "def train():\n    from kdlib.losses import kd_loss\n    return kd_loss\n"
    assert key(in_process(text.format("kd_loss"))) != key(in_process(text.format("hinton_loss")))
    assert key(in_process(loss)) != key(in_process(loss.replace("kd_loss", "hinton_loss")))


def test_an_optional_import_that_fails_is_passed_over(in_process, tmp_path, monkeypatch):
    (tmp_path / "needs_a_codec.py").write_text("import a_codec_that_nobody_has\nread = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = "def train():\n    try:\n        from needs_a_codec import read\n    except ImportError:\n        read = {}\n    return read\n"
    assert key(in_process(text.format(1))) != key(in_process(text.format(2)))
    plain = "def train():\n    import needs_a_codec\n    return needs_a_codec.read\n"
    assert len(key(in_process(plain))) == 64


def test_what_a_run_only_fills_does_not_count(in_process):
    module = in_process("seen, known = [], [1]\ndef train():\n    seen.append(len(known))\n")
    before = key(module)
    module.train()
    assert key(module) == before
    module.known.append(2)
    assert key(module) != before


def test_that_something_was_copied_does_not_count(in_process):
    """To copy or pickle an instance leaves ``__slotnames__`` in its class."""
    module = in_process(BASE)
    before = key(module)
    copy.copy(module.Plain()), copy.copy(module.Net())
    assert "__slotnames__" in vars(module.Plain) and key(module) == before


def test_how_a_rehearsal_is_measured_does_not_act(monkeypatch):
    before = fingerprint(kd.fit)
    monkeypatch.setattr(kd.rehearsal, "measure", lambda model, optimizer, step: step())
    monkeypatch.setattr(kd.rehearsal, "ROWS", 8)
    assert fingerprint(kd.fit) == before


def test_what_has_no_fingerprint_is_named_with_the_remedy(in_process):
    text = "import sys\nimport threading\nsys.modules[__name__].held = threading.Lock()\n"
    text += "def train():\n    return held\n"
    with pytest.raises(ValueError, match="lock.*has no fingerprint.*'fingerprint'"):
        key(in_process(text))
    with pytest.raises(ValueError, match="lock.*has no fingerprint"):
        fingerprint({"a": threading.Lock()})


def test_what_runs_counts_whatever_is_written(in_process):
    """An edit that is not loaded changes nothing, one that is loaded (``%autoreload 2``) counts."""
    module = in_process("def train():\n    return 1\n")
    before = key(module)
    Path(module.__file__).write_text("X = 1\n\n\ndef train():\n    return 2\n")
    assert key(module) == before
    exec(compile(Path(module.__file__).read_text(), module.__file__, "exec"), vars(module))
    assert key(module) != before


def test_code_without_source_counts():
    """As under ``python -c``, where the name of every source is "<string>", or what a notebook executes."""
    spaces = [{"__name__": "__main__"} for _ in range(3)]
    for space, text in zip(spaces, ("return 1", "return 2", "return 1  # said"), strict=True):
        exec(f"class A:\n    def go(self):\n        {text}\ndef train():\n    return A().go()", space)
    one, two, three = (fingerprint(space["train"]) for space in spaces)
    assert one == three != two


def test_an_unregistered_module_is_a_notebook(in_process):
    """A lesson's module has no file: its code counts as compiled, and not the module's name."""
    import types

    lesson = types.ModuleType("lesson_99")
    sys.modules["lesson_99"] = lesson
    try:
        exec(compile(BASE, "<99, cell 3>", "exec"), vars(lesson))
        assert fingerprint(lesson.train) == key(in_process(BASE))
        lesson.FACTOR = 5.0
        assert fingerprint(lesson.train) != key(in_process(BASE))
    finally:
        del sys.modules["lesson_99"]


@pytest.mark.parametrize(
    "one, other",
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        (None, "None"),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        (["ab", "c"], ["a", "bc"]),
        ({"a": 1}, {"a": 2}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.tensor([0.0, 1e-30])),
        (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float16)),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (partial(int, base=2), partial(int, base=3)),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (torch.float16, torch.bfloat16),
        (OrderedDict(a=1), {"a": 1}),
        (Path("a"), Path("b")),
        (Settings(a=1), Settings(a=2)),
    ],
)
def test_different_values_differ(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_equal_values_agree_whatever_their_memory():
    x = torch.randn(4, 6)
    assert fingerprint(x.T) == fingerprint(x.T.contiguous()) and fingerprint(x[:2]) == fingerprint(x[:2].clone())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(np.arange(6.0).reshape(2, 3).T) == fingerprint(np.arange(6.0).reshape(2, 3).T.copy())


def test_a_model_counts_by_weights_class_and_buffers_not_by_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprint(model)
    assert fingerprint(model.eval()) == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    changed = fingerprint(model)
    assert changed != before
    model.train()(torch.randn(4, 3))
    assert fingerprint(model) != changed


def test_an_objects_own_fingerprint_is_taken():
    class Data:
        def __init__(self, mark):
            self.fingerprint, self.lock = mark, threading.Lock()

    assert fingerprint(Data("a")) == fingerprint(Data("a")) != fingerprint(Data("b"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_two_values_agree_exactly_if_they_are_written_alike(one, other):
    def spelled(value):
        if isinstance(value, dict):
            return "{" + ",".join(sorted(repr(k) + spelled(v) for k, v in value.items())) + "}"
        return "[" + ",".join(map(spelled, value)) + "]" if isinstance(value, list) else repr(value)

    assert (fingerprint(one) == fingerprint(other)) == (spelled(one) == spelled(other))


# --- models: all that they hold, and their classes as they are now ---


class Holder(nn.Module):
    """Keeps its inner model where ``nn.Module`` does not look."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held[0](x)


class Scaled:
    """No module at all, but it holds one."""

    def __init__(self, inner):
        self.inner = inner


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 3)


def hooked(seed):
    model = nn.Linear(3, 3, bias=False)
    nn.init.ones_(model.weight)
    model.register_forward_hook(partial(_times, by=seed))
    return model


def _times(module, inputs, output, by=1):
    return by * output


def packed(seed):
    from torch.ao.nn.quantized import Linear

    layer = Linear(3, 3)
    layer.set_weight_bias(torch.quantize_per_tensor(linear(seed).weight.detach(), 0.1, 0, torch.qint8), torch.zeros(3))
    return layer


def bound(seed):
    model = linear()
    model.forward = partial(nn.functional.linear, weight=linear(seed).weight)
    return model


def dropped(seed):
    model = nn.Sequential(linear(), nn.Dropout(0.1))
    model[1].p = 0.1 * (seed + 1)
    return model


HELD = {
    "a list": lambda seed: Holder([linear(seed)]),
    "a dict": lambda seed: Holder({0: linear(seed)}),
    "a tuple of lists": lambda seed: Holder(([linear(seed)],)),
    "a set": lambda seed: Holder({float(seed), 2.0, "a"}),
    "an object that holds it": lambda seed: Holder([Scaled(linear(seed))]),
    "a plain tensor": lambda seed: Holder(torch.full((2,), float(seed))),
    "a list of tensors": lambda seed: Holder([torch.full((2,), float(seed))]),
    "an array": lambda seed: Holder(np.full(2, seed)),
    "a partial": lambda seed: Holder(partial(_times, by=seed)),
    "a closure": lambda seed: Holder([lambda x: linear, lambda x: x + seed]),
    "a hook": hooked,
    "packed weights": packed,
    "a forward of its own": bound,
    "a setting": dropped,
    "a sparse tensor": lambda seed: Holder(torch.eye(3).mul(seed + 1).to_sparse()),
    "a quantised tensor": lambda seed: Holder(torch.quantize_per_tensor(torch.ones(2) * (seed + 1), 0.1, 0, torch.qint8)),
    "a recurrent model": lambda seed: torch.manual_seed(seed) and nn.GRU(2, 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", HELD)
def test_a_model_counts_with_all_that_it_holds(what):
    make = HELD[what]
    assert fingerprint(make(0)) == fingerprint(make(0)) != fingerprint(make(1))


@pytest.fixture
def notebook():
    """Cells run in one space, as in a kernel."""
    space = {"__name__": "__main__"}

    def cell(text):
        exec(compile(text, "<cell>", "exec"), space)
        return fingerprint(space["train"])

    return cell


FIRST = """
import torch
from torch import nn
import torch.nn.functional as F
import kdlib as kd
class Student(nn.Module):
    width = 16
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, self.width)
def train(seed, folder):
    student, resnet = Student(), kd.models.resnet(8, 10)
    return F.relu(student.layer(torch.zeros(4))), kd.losses.kd_loss, nn.Linear(2, 2)
"""
PATCHES = {
    "a class attribute": ("Student.width = 64", ""),
    "a method added": ("Student.extra = lambda self: 1", ""),
    "a property replaced": ("Student.size = property(lambda self: 3)", ""),
    "a method of kdlib's class": (
        "old = kd.models.CifarResNet.forward\nkd.models.CifarResNet.forward = lambda self, x: x",
        "kd.models.CifarResNet.forward = old",
    ),
    "a method of torch's class": (
        "old = nn.Linear.forward\nnn.Linear.forward = lambda self, x: 2 * old(self, x)",
        "nn.Linear.forward = old",
    ),
    "a method of torch's class, wrapped": (
        "import functools\nold = nn.Linear.forward\n@functools.wraps(old)\ndef mine(self, x):\n    return 2 * old(self, x)\n"
        "nn.Linear.forward = mine",
        "nn.Linear.forward = old",
    ),
    "a method of the class under it": (
        "nn.Module.mine = lambda self: 1",
        "del nn.Module.mine",
    ),
    "a function of torch": ("old = F.relu\nF.relu = lambda x: x", "F.relu = old"),
    "a function that kdlib's function calls": (
        "old = kd.losses._kl\nkd.losses._kl = lambda *a: 0",
        "kd.losses._kl = old",
    ),
}


@pytest.mark.parametrize("what", PATCHES)
def test_a_patch_counts_and_taken_back_it_does_not(notebook, what):
    patch, back = PATCHES[what]
    before = notebook(FIRST)
    try:
        assert notebook(patch) != before
    finally:
        notebook(back)
    assert not back or notebook("") == before


def test_arguments_of_what_kdlib_made_count():
    """A schedule is a function that a function of kdlib returned: its code is one, its warmup is not."""
    assert fingerprint(kd.cosine(0.1)) == fingerprint(kd.cosine(0.1)) != fingerprint(kd.cosine(0.2))
    assert fingerprint(kd.cosine()) != fingerprint(kd.linear())


def test_the_state_of_the_process_does_not_count(in_process):
    text = "import os\nimport random\nfrom random import shuffle\nfrom os import environ\nimport numpy as np\n"
    text += "def train():\n    shuffle([]), random.random(), environ, os.environ, np.random.rand(), np.random\n"
    module = in_process(text)
    before = key(module)
    module.random.random(), module.np.random.rand()
    os.environ["KDLIB_TESTS_COUNT"] = "1"
    try:
        assert key(module) == before
    finally:
        del os.environ["KDLIB_TESTS_COUNT"]


@pytest.mark.parametrize("changed", ["labels", "images"])
def test_data_changed_in_place_count(changed):
    data = kd.data.images("digits").train
    before = fingerprint(data)
    getattr(data, changed)[0] += 1
    after = fingerprint(data)
    getattr(data, changed)[0] -= 1
    assert after != before == fingerprint(data)


def test_objects_that_hold_each_other_are_told_apart():
    def pair(back):
        one, other = Scaled(None), Scaled(None)
        one.inner, other.inner = other, (one if back else other)
        return one

    assert fingerprint(pair(True)) == fingerprint(pair(True)) != fingerprint(pair(False))


def test_another_process_agrees_on_what_fit_and_data_reach(tmp_path):
    """Whatever the order of its sets and the state of its generators: else no run would ever be found again."""
    text = "import kdlib as kd\nfrom torch import nn\n"
    text += "def train(seed, folder):\n    data = kd.data.images('digits'), kd.data.text('toy_topics')\n"
    text += "    return kd.fit, kd.cache_teacher, kd.models.resnet(8, 10), data, nn.Linear(2, 2)\n"
    assert hashed(tmp_path, text) == hashed(tmp_path, text)


def test_what_a_library_keeps_on_its_classes_for_speed_is_nothing(monkeypatch):
    """transformers notes on a model's class, at its first use, what it found out about it."""
    before = fingerprint(nn.Linear)
    monkeypatch.setattr(nn.Linear, "_can_do_this_cached_value", False, raising=False)
    assert fingerprint(nn.Linear) == before
    monkeypatch.setattr(nn.Linear, "gain", 2.0, raising=False)
    assert fingerprint(nn.Linear) != before


def test_a_language_model_is_the_same_in_every_process():
    """Python salts its hashes of strings; transformers keeps such a hash in a model's generation config."""
    make = (
        "import torch, transformers; from kdlib.fingerprint import fingerprint; torch.manual_seed(0);"
        "config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1);"
        "print(fingerprint(transformers.GPT2LMHeadModel(config)))"
    )
    found = [
        subprocess.check_output([sys.executable, "-c", make], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]


def test_a_library_that_wraps_its_own_functions_on_the_way_does_not_act():
    ask = (
        "import kdlib as kd, torch\nfrom kdlib.fingerprint import fingerprint\n"
        "of = lambda: fingerprint(kd.scale.seed_everything, torch.optim.Adam)\nbefore = of()\n"
        "import torch._dynamo\ntorch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).step()\nprint(before == of())"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
