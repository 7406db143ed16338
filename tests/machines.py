"""Folders that stand for `/` of machines that are not here, written as Linux shows them."""

from __future__ import annotations

from pathlib import Path

AVX2 = "fpu sse sse2 ssse3 fma sse4_1 sse4_2 f16c avx avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def processor(
    root: Path,
    model: str,
    flags: str,
    siblings: list[list[int]],
    governor: str | None = None,
    driver: str = "acpi-cpufreq",
) -> None:
    """`siblings`: the processors of each core."""
    count = sum(map(len, siblings))
    blocks = (
        f"processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: {model}\nflags\t\t: {flags}\n"
        for n in range(count)
    )
    write(root, {"proc/cpuinfo": "\n".join(blocks), "proc/loadavg": "0.05 0.10 0.08 1/812 4242"})
    cpus = "sys/devices/system/cpu"
    write(root, {f"{cpus}/online": f"0-{count - 1}" if count > 1 else "0"})
    for core in siblings:
        for n in core:
            topology = f"{cpus}/cpu{n}/topology/thread_siblings_list"
            write(root, {topology: ",".join(map(str, core))})
            write(root, {f"{cpus}/cpu{n}/thermal_throttle/core_throttle_count": "0"})
            if governor is not None:
                write(root, {f"{cpus}/cpu{n}/cpufreq/scaling_governor": governor})
                write(root, {f"{cpus}/cpu{n}/cpufreq/scaling_driver": driver})


def memory(
    root: Path,
    total: int = 64 * GIB,
    available: int = 48 * GIB,
    swap: tuple[int, int] = (0, 0),
    huge_pages: str = "always [madvise] never",
) -> None:
    """`swap`: all of it, and what is free of it."""
    sizes = {
        "MemTotal": total,
        "MemFree": available // 2,
        "MemAvailable": available,
        "SwapTotal": swap[0],
        "SwapFree": swap[1],
    }
    lines = (f"{name + ':':<15} {size >> 10:>9} kB" for name, size in sizes.items())
    write(root, {"proc/meminfo": "\n".join(lines) + "\nHugePages_Total:       0"})
    write(root, {"sys/kernel/mm/transparent_hugepage/enabled": huge_pages})
    write(root, {"sys/devices/system/node/node0/cpulist": "0-7"})


def cgroup(root: Path, path: str, files: dict[str, str]) -> None:
    write(root, {"proc/self/cgroup": f"0::{path}"})
    write(root, {f"sys/fs/cgroup{path}/{name}": text for name, text in files.items()})


def card(
    root: Path,
    address: str,
    ids: tuple[str, str],
    driver: str | None,
    link: tuple[int, int] | None = (16, 16),
    kind: str = "0x030000",
) -> None:
    """`ids`: vendor and device; `link`: lanes in use and all of the card's."""
    folder = f"sys/bus/pci/devices/{address}"
    write(root, {f"{folder}/vendor": ids[0], f"{folder}/device": ids[1], f"{folder}/class": kind})
    if driver is not None:
        (root / folder / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")
    if link is not None:
        speeds = {"current": (link[0], "2.5 GT/s PCIe"), "max": (link[1], "16.0 GT/s PCIe")}
        for which, (width, speed) in speeds.items():
            write(root, {f"{folder}/{which}_link_width": str(width)})
            write(root, {f"{folder}/{which}_link_speed": speed})


def nvidia(root: Path, address: str = "0000:01:00.0") -> None:
    """The driver's own files, and those in /dev."""
    version = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.07  Release Build  "
        "(dvs-builder@U16)\nGCC version:  gcc version 12.3.0"
    )
    information = "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 183\nBus Type: \t PCIe"
    write(root, {"proc/driver/nvidia/version": version})
    write(root, {f"proc/driver/nvidia/gpus/{address}/information": information})
    write(root, {f"dev/{name}": "" for name in ("nvidia0", "nvidiactl", "nvidia-uvm")})


def workstation(root: Path) -> None:
    """16 threads on 8 cores, one RTX 4090 with its driver, an integrated GPU."""
    siblings = [[n, n + 8] for n in range(8)]
    flags = f"{AVX512} avx512_vnni avx512_bf16"
    processor(root, "AMD Ryzen 7 7700X 8-Core Processor", flags, siblings, "performance")
    memory(root)
    cgroup(root, "/user.slice/user-1000.slice", {"memory.max": "max", "cpu.max": "max 100000"})
    card(root, "0000:01:00.0", ("0x10de", "0x2684"), "nvidia")
    card(root, "0000:00:1f.3", ("0x8086", "0x7a50"), "snd_hda_intel", kind="0x040300")
    nvidia(root)


def container(root: Path) -> None:
    """Half a processor and 2 GiB of a server with AVX2."""
    processor(root, "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", f"{AVX2} hypervisor", [[0], [1]])
    memory(root, 32 * GIB, 20 * GIB)
    limits = {
        "memory.max": str(2 * GIB),
        "memory.current": str(GIB),
        "memory.stat": f"anon 4096\ninactive_file {GIB // 2}",
        "cpu.max": "50000 100000",
    }
    cgroup(root, "/", limits)


def laptop(root: Path) -> None:
    """An AMD processor with its own GPU, which Linux drives; swapping, and on its lowest clock."""
    processor(root, "AMD Ryzen 5 5500U", AVX2, [[0, 1], [2, 3]], "powersave")
    memory(root, 8 * GIB, GIB // 2, (4 * GIB, 3 * GIB), "always madvise [never]")
    card(root, "0000:03:00.0", ("0x1002", "0x164c"), "amdgpu", None)
    folder = "sys/bus/pci/devices/0000:03:00.0"
    write(root, {f"{folder}/mem_info_vram_total": str(GIB // 2)})
    write(root, {f"{folder}/mem_info_vram_used": str(GIB // 4)})
    write(root, {"sys/module/amdgpu/refcnt": "12", "dev/kfd": "", "dev/dri/renderD128": ""})


NVIDIA_SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <timestamp>Fri Nov 27 10:00:00 2026</timestamp>
  <driver_version>570.133.07</driver_version>
  <cuda_version>12.8</cuda_version>
  <attached_gpus>1</attached_gpus>
  <gpu id="00000000:01:00.0">
    <product_name>NVIDIA GeForce RTX 4090</product_name>
    <fb_memory_usage>
      <total>24564 MiB</total><reserved>512 MiB</reserved>
      <used>9000 MiB</used><free>15052 MiB</free>
    </fb_memory_usage>
    <clocks_event_reasons>
      <clocks_event_reason_gpu_idle>Not Active</clocks_event_reason_gpu_idle>
      <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
      <clocks_event_reason_hw_slowdown>Active</clocks_event_reason_hw_slowdown>
      <clocks_event_reason_hw_thermal_slowdown>Active</clocks_event_reason_hw_thermal_slowdown>
    </clocks_event_reasons>
    <temperature><gpu_temp>91 C</gpu_temp><gpu_temp_max_threshold>N/A</gpu_temp_max_threshold>
    </temperature>
    <gpu_power_readings>
      <power_draw>298.11 W</power_draw><current_power_limit>300.00 W</current_power_limit>
      <default_power_limit>450.00 W</default_power_limit>
    </gpu_power_readings>
    <clocks><graphics_clock>915 MHz</graphics_clock><sm_clock>915 MHz</sm_clock></clocks>
    <max_clocks><sm_clock>3105 MHz</sm_clock></max_clocks>
    <processes>
      <process_info><pid>4711</pid><type>C</type><process_name>python3</process_name>
        <used_memory>8400 MiB</used_memory></process_info>
      <process_info><pid>900</pid><type>G</type><process_name>/usr/lib/Xorg</process_name>
        <used_memory>N/A</used_memory></process_info>
    </processes>
  </gpu>
</nvidia_smi_log>
"""
