"""bitsandbytes is imported without PyTorch's compiler, and what it compiles is compiled when it is called."""

import subprocess
import sys

from conftest import ROOT

from posttrain import light_bitsandbytes


def test_compiling_waits_for_the_first_call():
    made = []

    def compile_now(function, **how):
        made.append(how)
        return lambda x: function(x) + 0.5

    later = light_bitsandbytes._compile_later(compile_now)

    @later(dynamic=True)
    def double(x):
        return 2 * x

    plain = later(lambda x: x)
    assert not made and double.__name__ == "double"
    assert double(3) == 6.5 and double(4) == 8.5 and made == [{"dynamic": True}]
    assert plain(1) == 1.5 and made == [{"dynamic": True}, {}]


def test_no_compiler_is_loaded():
    code = (
        "import sys, torch\n"
        "from posttrain.light_bitsandbytes import import_bitsandbytes\n"
        "before = torch.compile\n"
        "import_bitsandbytes()\n"
        "assert torch.compile is before and 'bitsandbytes' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
