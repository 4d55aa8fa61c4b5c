"""A processor in software with Linux on it (built by scripts/bochs.py), on which the kernel runner calls kernels."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from kernel_runner import ROOT, Runner

sys.path.insert(0, str(ROOT / "scripts"))
from bochs import BOCHS, FROM_DEBIAN

__all__ = ["Emulated", "Machine", "missing"]

# The first program: loads what reaches the disks, then makes the calls whose table and bytes of cases a line names; the cases lie
# on one disk, the results go to the other.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in /modules/*; do insmod $m; done
until [ -b /dev/sdb ]; do sleep 0.01; done
stty -F /dev/ttyS0 -echo
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
echo "@@ ready"
while read -r table size; do
  blockdev --flushbufs /dev/sda
  head -c $size /dev/sda > /cases
  if [ $table = list ]; then kernel_runner; else kernel_runner $table /cases /results; fi
  code=$?
  if [ -f /results ]; then size=$(stat -c %s /results); cat /results > /dev/sdb; sync; rm /results; else size=0; fi
  echo "@@ done $code $size"
done
"""
# clearcpuid=580, fsrm: Linux before 6.5 copies beyond all ends where short copies are said to be fast and long ones are not, as Bochs does.
BOOT = """\
DEFAULT linux
LABEL linux
 KERNEL vmlinuz
 APPEND initrd=initrd console=ttyS0,115200 quiet mitigations=off nokaslr no5lvl clearcpuid=580 tsc=reliable no_timer_check panic=-1
"""
# ips: instructions until Linux thinks that a second has passed; few, so that threads take turns often.
BOCHSRC = """\
cpu: model={cpu}, count=1, ips=200000000
memory: guest=1024, host=1024
romimage: file={bochs}/BIOS
vgaromimage: file={bochs}/vgabios
ata0-master: type=disk, path={folder}/cases, mode=flat
ata0-slave: type=disk, path={folder}/results, mode=flat
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=cdrom, path={folder}/disc, status=inserted
boot: cdrom
com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}
display_library: nogui
log: {folder}/log
panic: action=fatal
error: action=ignore
clock: sync=none
"""
DISK = 1024 * 16 * 63 * 512  # bytes; cylinders, heads, sectors


def missing() -> str:
    """What to do before a Machine can be made; empty if nothing."""
    packages = [package for file, package in FROM_DEBIAN.items() if not Path(file).exists()]
    if packages:
        return f"Debian's {', '.join(packages)} not found"
    return "" if BOCHS.exists() else "Bochs is not built (python scripts/bochs.py)"


class Machine:
    """A processor of Bochs's list, with Linux, a (statically linked) kernel runner and nothing else. It is up in a minute."""

    def __init__(self, cpu: str, program: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zamba2-machine-")
        folder = Path(self._folder.name)
        self.cases, self.results = folder / "cases", folder / "results"
        for disk in (self.cases, self.results):
            with disk.open("wb") as file:
                file.truncate(DISK)
        self._write_disc(folder, program)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(60)
            (folder / "bochsrc").write_text(BOCHSRC.format(cpu=cpu, bochs=BOCHS, folder=folder, port=server.getsockname()[1]))
            with (folder / "said").open("wb") as said:
                self._process = subprocess.Popen([BOCHS / "bochs", "-q", "-f", folder / "bochsrc"], stdout=said, stderr=said)
            try:
                self._line = server.accept()[0]
                self._line.settimeout(600)
                self._heard = b""
                self.until("@@ ready")
            except BaseException:
                self.close()
                raise

    def _write_disc(self, folder: Path, program: Path) -> None:
        root, disc = folder / "root", folder / "files"
        for name in ("bin", "proc", "sys", "dev"):
            (root / name).mkdir(parents=True)
        disc.mkdir()
        shutil.copytree(BOCHS / "modules", root / "modules")
        shutil.copy("/bin/busybox", root / "bin")
        shutil.copy(program, root / "bin")
        (root / "init").write_text(INIT)
        os.chmod(root / "init", 0o755)
        with (disc / "initrd").open("wb") as file:
            subprocess.run("find . | busybox cpio -o -H newc", shell=True, cwd=root, stdout=file, stderr=subprocess.DEVNULL, check=True)
        shutil.copy(BOCHS / "vmlinuz", disc)
        for file_name in FROM_DEBIAN:
            if file_name.endswith((".bin", ".c32")):
                shutil.copy(file_name, disc)
        (disc / "isolinux.cfg").write_text(BOOT)
        subprocess.run(
            ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "disc"), "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot",
             "-boot-load-size", "4", "-boot-info-table", str(disc)], stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip

    def tell(self, line: str) -> None:
        self._line.sendall(f"{line}\n".encode())

    def until(self, mark: str) -> tuple[str, str]:
        """What is said before the next line with the mark, and what that line says behind it."""
        while mark.encode() not in self._heard or b"\n" not in self._heard.partition(mark.encode())[2]:
            try:
                data = self._line.recv(1 << 16)
            except TimeoutError:
                data = b""
            assert data, f"the emulated machine ended, or stands; it said last: {self._heard[-2000:].decode(errors='replace')}"
            self._heard += data
        before, _, rest = self._heard.partition(mark.encode())
        line, _, self._heard = rest.partition(b"\n")
        return before.decode().replace("\r", ""), line.decode().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if hasattr(self, "_line"):
            self._line.close()
        self._folder.cleanup()


class Emulated(Runner):
    """The kernel runner on a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        super().__init__("kernel_runner")

    def _start(self, *arguments: str) -> str:
        table, cases, results = arguments or ("list", os.devnull, os.devnull)  # a list has no results
        data = Path(cases).read_bytes()
        assert len(data) <= DISK
        with self.machine.cases.open("r+b") as file:
            file.write(data)
        self.machine.tell(f"{table} {len(data)}")
        said, done = self.machine.until("@@ done")
        code, size = done.split()
        assert code == "0", f"exit code {code}\n{said}"
        with self.machine.results.open("rb") as file:
            data = file.read(int(size))
        Path(results).write_bytes(data)
        return said
