"What every test here shares: the markers, and an environment without network and with one thread a process."
import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")


def pytest_configure(config):
    "`make test` leaves out both; `make test-full` runs slow, and gpu where there is one."
    config.addinivalue_line("markers", "slow: takes more than a minute")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
