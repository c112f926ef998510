"""The instructions that the C++ is compiled for, and the variable by which a machine pretends to have fewer."""

import pytest
import torch

from kernelwarehouse.models.ops.cpu import BuildError, instructions
from kernelwarehouse.models.ops.cpu.build import flags

ALL = ["avx2", "avx512"]


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a machine with some of the instructions, or with another system or processor."""

    def pretend(known=(), system="Linux", processor="x86_64"):
        capability = "AVX512" if "avx512" in known else "AVX2" if "avx2" in known else "DEFAULT"
        monkeypatch.delenv("KERNELWAREHOUSE_CPU", raising=False)
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.machine", lambda: processor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize("count", range(3))
def test_they_are_those_of_the_processor(machine, count):
    machine(ALL[:count])
    assert instructions() == ALL[:count]


@pytest.mark.parametrize("last", range(2))
def test_the_variable_names_the_last_one(machine, monkeypatch, last):
    machine(ALL)
    monkeypatch.setenv("KERNELWAREHOUSE_CPU", ALL[last])
    assert instructions() == ALL[: last + 1]
    machine(["avx2"])
    monkeypatch.setenv("KERNELWAREHOUSE_CPU", ALL[last])
    assert instructions() == ["avx2"]  # the processor has no more


def test_a_wrong_name_is_refused(monkeypatch):
    monkeypatch.setenv("KERNELWAREHOUSE_CPU", "avx10")
    with pytest.raises(ValueError, match="KERNELWAREHOUSE_CPU is 'avx10', which is none of avx2, avx512"):
        instructions()


def test_the_compiler_is_told_of_no_others(machine, monkeypatch):
    machine(ALL)
    assert {"-mavx2", "-mavx512f"} < set(flags())
    monkeypatch.setenv("KERNELWAREHOUSE_CPU", "avx2")
    assert flags() == ["-mavx2", "-mfma"]


def test_a_processor_without_any_is_told_what_it_needs(machine):
    machine()
    with pytest.raises(BuildError, match="the processor needs AVX512 or AVX2, and torch found DEFAULT"):
        flags()


def test_on_an_arm_nothing_of_x86_is_compiled(machine):
    machine(ALL, processor="aarch64")
    assert instructions() == []
    assert flags() == []


@pytest.mark.parametrize(("system", "processor"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_elsewhere_it_is_said_what_it_is_compiled_for(machine, system, processor):
    machine(ALL, system, processor)
    with pytest.raises(BuildError, match=rf"on Linux for x86_64 and aarch64, not on {system} for {processor}"):
        flags()
