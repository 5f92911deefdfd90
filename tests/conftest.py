import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test does

os.environ["HF_HUB_OFFLINE"] = "1"

# torch's compiler writes plain code in every test: to try out which vector instructions there are takes longer than
# to compile, and is done once a process, so that a single test which did without would decide it for those after it
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"

torch.set_num_threads(1)  # the models here are so small that a second thread only costs


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _nothing_compiled_before_is_used(tmp_path_factory):
    """Graphs that another run has compiled, with other settings, would be taken from torch's cache as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def no_collecting(monkeypatch):
    """Without it most of the time of a test that runs out of memory goes into collecting garbage."""
    monkeypatch.setattr("fastlur.microbatch.gc.collect", lambda: 0)


@pytest.fixture
def cnn():
    from fastlur.demo import residual_cnn

    return residual_cnn(width=4)


@pytest.fixture
def two(tmp_path):
    """Two checkpoints of a run, and what wrote them."""
    from checkpoints import Two

    made = Two(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def compiled(request):
    """The extension of these sources is the one in service.

    A compiler that is present and a build that fails is a failure; without a compiler the tests that ask for this are
    skipped, unless FASTLUR_EXT=1 asks for them. FASTLUR_EXT_PATH names another library to test.
    """
    import building

    from fastlur import _extension as extension

    if named := os.environ.get("FASTLUR_EXT_PATH"):
        assert extension.load(named) is None, extension.load(named)
        assert extension.library() == Path(named).resolve()
        return
    if building.COMPILER is None:
        if os.environ.get("FASTLUR_EXT") == "1":
            pytest.fail("FASTLUR_EXT=1, but there is no C++ compiler; install one or name it in CXX")
        pytest.skip("no C++ compiler")
    library = building.library()
    if extension.library() in (None, library):
        assert extension.load(library) is None
        assert extension.library() == library
        return
    # a test before these has loaded another one, perhaps of older sources: what was just built is tested elsewhere
    arguments = ["-p", "no:cacheprovider", str(request.path)]
    done = building.run(building.ROOT, ["-m", "pytest"], *arguments, FASTLUR_EXT_PATH=str(library))
    if done.returncode != 0:
        pytest.fail(f"in a process of its own, because {extension.library()} is loaded here:\n{done.stdout[-4000:]}")
    pytest.skip(f"passed in a process of its own, because {extension.library()} is loaded here")
