#!/usr/bin/env python3
"""Builds an x86-64 machine in software: Bochs, an emulator of whole processors, AVX-512 and AMX among what they have, and a Linux for it.

    python scripts/bochs.py                   # two minutes on two cores, once; then it is in build/bochs
    pytest -m slow tests/test_emulated.py     # every kernel and whole prompts on it, and who may use which on older processors

For Debian, with: apt install g++ make xorriso isolinux syslinux-common busybox-static. Source, BIOS and Linux come from Debian's archive.
Speeds mean nothing there.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from zamba2.errors import Zamba2Error
from zamba2.weights.files import replacing

BOCHS = Path(__file__).resolve().parent.parent / "build" / "bochs"  # bochs, BIOS, vgabios, vmlinuz; modules, numbered in their order
POOL = "http://deb.debian.org/debian/pool/main"
ARCHIVES = {  # of Debian 13
    "b/bochs/bochs_3.0+dfsg.orig.tar.xz": "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b",
    "b/bochs/bochsbios_3.0+dfsg-1_all.deb": "13f8f4bdd9bb5c07378b7e39042cb631ebdd41d00b0f1a3091caab17ca946a5b",
    "v/vgabios/vgabios_0.8a+ds-2_all.deb": "921cca705c76139df423782979c3e4fe93a246ae3adc143ba17a321decf3544b",
}
FROM_DEBIAN = {  # needed here and on the disc -> their packages
    "/usr/lib/ISOLINUX/isolinux.bin": "isolinux", "/usr/lib/syslinux/modules/bios/ldlinux.c32": "syslinux-common",
    "/usr/bin/xorriso": "xorriso", "/bin/busybox": "busybox-static", "/usr/bin/make": "make", "/usr/bin/g++": "g++",
}  # fmt: skip
# What reaches the disks that cases and results lie on, in the order in which they are loaded.
MODULES = (
    "scsi_common", "scsi_mod", "libata", "crct10dif_common", "crct10dif_generic", "crc-t10dif", "crc64", "crc64_rocksoft_generic",
    "crc64-rocksoft", "t10-pi", "sd_mod", "ata_piix",
)  # fmt: skip
OPTIONS = (
    "--enable-x86-64", "--enable-avx", "--enable-evex", "--enable-amx", "--enable-all-optimizations", "--with-nogui", "--disable-docbook",
)  # fmt: skip
# Bochs 3.0 lacks XFD, without which Linux gives nobody tiles. Of a thread that has to wait it saves tiles' sizes the wrong way round,
# half of their rows, and those of no thread that uses them. It converts the second half of a vector to bf16 from behind its end.
# File, what stands there, what is to.
AMX = "BX_CPU_THIS_PTR amx->tilecfg[n]"
XFD = "BX_CPU_THIS_PTR msr.ia32_xfd"
MENDED = (
    ("cpu/cpu.h", "Bit64u ia32_xss;", "Bit64u ia32_xss, ia32_xfd, ia32_xfd_err;"),
    ("cpu/init.cc", "msr.ia32_xss = 0;", f"msr.ia32_xss = 0; {XFD} = {XFD}_err = 0;"),
    ("cpu/cpuid.cc", "leaf->eax |= (1<<3);", "leaf->eax |= (1<<3) | (1<<4);"),
    (
        "cpu/msr.cc", "  msr_desc[BX_MSR_XSS] =",
        '  msr_desc[0x1c4] = new MSR_Descriptor("XFD", BX_ISA_XSAVES); msr_desc[0x1c5] = new MSR_Descriptor("XFD_ERR", BX_ISA_XSAVES);\n'
        "  msr_desc[BX_MSR_XSS] =",
    ),
    (
        "cpu/msr.cc", "val64 = BX_CPU_THIS_PTR msr.ia32_xss;\n      break;",
        "val64 = BX_CPU_THIS_PTR msr.ia32_xss;\n      break;\n"
        f"    case 0x1c4: val64 = {XFD}; break;\n    case 0x1c5: val64 = {XFD}_err; break;",
    ),
    (
        "cpu/msr.cc", "    case BX_MSR_XSS:\n      {",
        f"    case 0x1c4: {XFD} = val_64; handleAvxModeChange(); break;\n    case 0x1c5: {XFD}_err = val_64; break;\n"
        "    case BX_MSR_XSS:\n      {",
    ),
    ("cpu/proc_ctrl.cc", "    clear_amx_ok();\n  else", f"    clear_amx_ok();\n  else if ({XFD} >> 18 & 1)\n    clear_amx_ok();\n  else"),
    (
        "cpu/proc_ctrl.cc", "(BX_XCR0_XTILECFG_MASK | BX_XCR0_XTILEDATA_MASK))\n    exception(BX_UD_EXCEPTION, 0);",
        "(BX_XCR0_XTILECFG_MASK | BX_XCR0_XTILEDATA_MASK))\n    exception(BX_UD_EXCEPTION, 0);\n"
        f"  if ({XFD} >> 18 & 1) {{\n    {XFD}_err |= 1 << 18;\n    exception(BX_NM_EXCEPTION, 0);\n  }}",
    ),
    ("cpu/xsave.cc", "row < BX_TILE_REGISTERS", "row < BX_TILE_MAX_ROWS"),
    ("cpu/xsave.cc", f"tilecfg.vmm16u(8+n)    = {AMX}.rows;", f"tilecfg.vmm16u(8+n) = {AMX}.bytes_per_row;"),
    ("cpu/xsave.cc", f"tilecfg.vmmubyte(48+n) = {AMX}.bytes_per_row;", f"tilecfg.vmmubyte(48+n) = {AMX}.rows;"),
    ("cpu/xsave.cc", "amx->tile_use_tracker == 0", "amx->tile_use_tracker != 0"),
    ("cpu/avx/avx512_bf16.cc", "(op1.vmm32u(n));\n\n  if", "(op1.vmm32u(n - DWORD_ELEMENTS(len)));\n\n  if"),
)  # fmt: skip


def fetch(path: str, digest: str, folder: Path) -> Path:
    target = folder / path.rsplit("/", 1)[1]
    with urllib.request.urlopen(f"{POOL}/{path}", timeout=60) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    if (found := hashlib.sha256(target.read_bytes()).hexdigest()) != digest:
        raise Zamba2Error(f"{POOL}/{path} has the SHA-256 {found}; {digest} was expected.")
    return target


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Zamba2Error(f"{' '.join(map(str, command))} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def mend(source: Path) -> None:
    for name, old, new in MENDED:
        text = (source / name).read_text(encoding="latin-1")
        if old not in text:
            raise Zamba2Error(f"{source / name} has no {old!r}: it is another version of Bochs than 3.0.")
        (source / name).write_text(text.replace(old, new), encoding="latin-1")


def make(target: Path, work: Path) -> None:
    """Build everything in ``work`` and put into ``target`` what stays."""
    print("fetching Bochs and Linux", file=sys.stderr, flush=True)
    archives = [fetch(path, digest, work) for path, digest in ARCHIVES.items()]
    newest = re.search(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", "linux-image-amd64", folder=work))
    if newest is None:
        raise Zamba2Error("apt knows no Linux that linux-image-amd64 stands for; run: apt-get update")
    release = newest[1]
    run("apt-get", "download", "-q", release, folder=work)
    for archive in (*archives[1:], next(work.glob(f"{release}_*.deb"))):
        run("dpkg-deb", "-x", archive, "files", folder=work)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(work / "source", filter="data")
    source = next((work / "source").iterdir())
    mend(source)
    print("building Bochs", file=sys.stderr, flush=True)
    run("sh", "configure", *OPTIONS, "CXXFLAGS=-O3", folder=source)
    run("make", f"-j{os.cpu_count() or 1}", folder=source)
    modules = target / "modules"
    modules.mkdir()
    for number, name in enumerate(MODULES):
        found = next((work / "files").rglob(f"{name}.ko*"), None)
        if found is None:
            raise Zamba2Error(f"{release} has no module {name}; the list in {__file__} is Linux 6.1's.")
        data = found.read_bytes()
        (modules / f"{number:02}.ko").write_bytes(lzma.decompress(data) if found.suffix == ".xz" else data)
    share = work / "files" / "usr" / "share"
    kept = {
        "bochs": source / "bochs", "BIOS": share / "bochs" / "BIOS-bochs-latest", "vgabios": share / "vgabios" / "vgabios.bin",
        "vmlinuz": next((work / "files" / "boot").glob("vmlinuz-*")),
    }  # fmt: skip
    for name, file in kept.items():
        shutil.copy(file, target / name)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if BOCHS.exists():
        print(f"{BOCHS} is there; delete it to build anew.")
        return
    if missing := [package for file, package in FROM_DEBIAN.items() if not Path(file).exists()]:
        print(f"bochs.py: packages are missing; install them with: apt install {' '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    try:
        with replacing(BOCHS) as target, tempfile.TemporaryDirectory() as work:
            target.mkdir()
            make(target, Path(work))
    except (Zamba2Error, OSError) as error:
        print(f"bochs.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{BOCHS} is built.")


if __name__ == "__main__":
    main()
