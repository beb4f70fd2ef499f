"""Wrong solutions that try to pass all the same."""

from __future__ import annotations

from tests.evaluation.hostile import forgery

EQUAL = "class E{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
SPEAK = "import json, os, struct, fcntl\ndef say(m, fd):\n    d = json.dumps(m).encode()\n    os.write(fd, struct.pack('<I', len(d)) + d)\n"
SEARCH = '''
import gc, os, re, sys
def f(x=None):
    """Whatever looks like the expected answer, in every object, frame, module and descriptor here."""
    pattern, words = re.compile("token-[0-9a-f]{16}"), []
    frame = sys._getframe()
    while frame: words.append(repr(frame.f_locals)); frame = frame.f_back
    words += [w for o in gc.get_objects() for w in gc.get_referents(o) if type(w) in (str, bytes)]
    for fd in range(3, 64):
        try: words.append(os.pread(fd, 1 << 20, 0).decode(errors="replace"))
        except OSError: pass
    for word in map(str, words):
        if m := pattern.search(word): return m.group()
'''
FORGERIES = [
    forgery("os._exit(0)", "import os; os._exit(0)", quick=True),
    forgery("sys.exit(0)", "import sys; sys.exit(0)"),
    forgery("leave when asked", "import os\ndef f(x): os._exit(0)", quick=True),
    forgery("leave from a thread", "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()\ndef f(x): time.sleep(5)"),
    forgery("always equal", EQUAL.format(base="") + "def f(x): return E()", quick=True),
    forgery("an int that is always equal", EQUAL.format(base="(int)") + "def f(x): return E(7)", quick=True),
    forgery("always equal, in a list", EQUAL.format(base="") + "def f(x): return [E()]", ("assert f(2) == [3]",)),
    forgery("a list that is always equal", EQUAL.format(base="(list)") + "def f(x): return E()", ("assert f(2) == [3]",)),
    forgery("a string that is always equal", EQUAL.format(base="(str)") + "def f(x): return E()", ("assert f(2) == 'x'",)),
    forgery("a dict that is always equal", EQUAL.format(base="(dict)") + "def f(x): return E()", ("assert f(2) == {1: 2}",)),
    forgery("always equal, as a key", "class E:\n    def __eq__(s, o): return True\n    def __hash__(s): return hash(1)\ndef f(x): return {E(): 2}", ("assert f(2) == {1: 2}",)),
    forgery("always contains", "class E:\n    def __contains__(s, o): return True\n    def __iter__(s): return iter(())\ndef f(x): return E()", ("assert 3 in f(2)",)),
    forgery("a class for a function", EQUAL.format(base="") + "class f(E):\n    def __init__(s, x): pass"),
    forgery("a metaclass", "class M(type):\n    def __eq__(s, o): return True\n    def __hash__(s): return 1\n    def __call__(s, x): return s\nclass f(metaclass=M): pass"),
    forgery("always close", "class E(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __abs__(s): return 0.0\ndef f(x): return E(7)", ("assert abs(f(2) - 3) < 1e-6",)),
    forgery("replaced exec", "import builtins\nbuiltins.exec = lambda *a: None", quick=True),
    forgery("replaced compile", "import builtins\nreal = compile\nbuiltins.compile = lambda s, *a, **k: real('pass', 'x', 'exec')", quick=True),
    forgery("replaced AssertionError", "import builtins\nclass A(Exception):\n    def __new__(c, *a): raise SystemExit(0)\nbuiltins.AssertionError = A\ndef f(x): return 0"),
    forgery("assertions that raise nothing", "import builtins, ctypes\nbuiltins.AssertionError = Warning\ndef f(x): return 0"),
    forgery("a set and a len of its own", "set = lambda *a: {1}\nlen = lambda *a: 3\ndef f(x): return 0", ("assert set(f(2)) == {1}", "assert len([f(1)]) == 3"), quick=True),
    forgery("replaced helpers in builtins", "import builtins\nbuiltins.sorted = builtins.set = lambda *a, **k: [3]\ndef f(x): return 0", ("assert sorted([f(2)]) == [3]",)),
    forgery("a module of its own for math", "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", ("import math\nassert math.isclose(f(2), 3.0)",), quick=True),
    forgery("math without an import", "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", ("assert math.isclose(f(2), 3.0)",)),
    forgery("patched math", "import math, sys\nmath.isclose = lambda *a, **k: True\nsys.modules['math'] = math\ndef f(x): return 0", ("import math\nassert math.isclose(f(2), 3.0)",)),
    forgery("a check of its own", "def check(candidate): pass\ndef f(x): return 0", ("def check(candidate):\n    assert candidate(2) == 3", "check(f)"), quick=True),
    forgery("a helper of its own", "def poly(xs, x): return 0\ndef f(xs): return 77", ("def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))", "assert abs(poly([1, 2], f([1, 2]))) < 1e-4")),
    forgery("a changed constant", "import ctypes\ndef f(x):\n    ctypes.memmove(id(3) + 24, ctypes.byref(ctypes.c_int(2)), 4)\n    return 2", quick=True),
    forgery("through its frames", "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for k in list(frame.f_locals): frame.f_locals[k] = 'passed'\n        frame = frame.f_back\n    return 0"),
    forgery("patching the harness", "import sys\nfor n, m in list(sys.modules.items()):\n    if n.startswith('jail.'):\n        for k in ('encode', 'status', 'describe', 'execute', 'decode'):\n            if hasattr(m, k): setattr(m, k, lambda *a: 'passed')\ndef f(x): return 0"),
    *[
        forgery(f"the word {word[-1]}", SPEAK + f"for fd in range(3, 20):\n    try: say({[*word]}, fd)\n    except OSError: pass\n", quick=word[0] == "failed")
        for word in (("end", "passed"), ("failed", "passed", "judged"), ("ready",), ("refused",), ("value", True), ("go",))
    ],
    forgery("lines for the guard", "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[\"end\", \"passed\", 1, \"\"]\\n' * 99)\n    except OSError: pass\nos._exit(0)"),
    forgery("garbage for the judge", "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'\\xff\\x00\\x00\\x00' + b'{' * 255)\n    except OSError: pass\n"),
    forgery("an answer without a bottom", "def f(x):\n    l = []\n    for _ in range(100_000): l = [l]\n    return l"),
    forgery("an answer that contains itself", "def f(x):\n    l = []; l.append(l)\n    return l", ("assert f(2) == [3]",)),
    forgery("a reference to nothing", SPEAK + "def f(x):\n    for fd in range(3, 20):\n        try: say(['value', {'ref': 99}], fd); break\n        except OSError: pass\n"),
    forgery("an exception that ends tests", "def f(x): raise KeyboardInterrupt"),
    forgery("StopIteration", "def f(x): raise StopIteration"),
    forgery("an exit when asked", "def f(x): raise SystemExit(0)"),
    forgery("searching for the answer", SEARCH, ("assert f() == {token!r}",), quick=True),
    forgery("closing the judge's pipe", "import os\ndef f(x): os.closerange(3, 64)"),
]  # fmt: skip
