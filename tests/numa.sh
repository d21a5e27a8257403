#!/usr/bin/env bash
# numa.sh TEST-PROGRAM FOLDER: runs the program in a machine with two memory nodes, made up by QEMU in software.
#
# FOLDER/vmlinuz is the kernel; `./dev test numa` puts it there. The program and the libraries that it needs go into an
# initial file system; what it prints comes over the serial line, its exit status among it. 77: something is missing.
set -euo pipefail
program=$1
folder=$2
patience=240  # seconds; it takes about 30

for tool in qemu-system-x86_64 cpio busybox; do
  command -v "$tool" >/dev/null || { printf 'skipped: expected %s, found none; ./dev test numa installs it\n' "$tool"; exit 77; }
done
[[ -e $folder/vmlinuz ]] || { printf 'skipped: expected a kernel at %s; ./dev test numa fetches it\n' "$folder/vmlinuz"; exit 77; }

root=$folder/root
rm -rf "$root"
mkdir -p "$root"/{bin,dev,proc,sys,tmp}
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$program" "$root/bin/test-numa"
# Its libraries, at the paths where the loader will look for them.
ldd "$program" | grep -oE '/[^ ]+' | while read -r library; do
  mkdir -p "$root/$(dirname "$library")"
  cp -L "$library" "$root/$library"
done
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b mkdir -p /dev/shm
$b mount -t tmpfs -o mode=1777 none /dev/shm
$b chmod 1777 /tmp
$b ip link set lo up 2>/dev/null
/bin/test-numa --no-colors=true
echo "test-numa ended with status $?"
$b poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$folder/initrd.gz"

log=$folder/serial.log
status=0
timeout --foreground "$patience" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -m 768M \
  -smp 4,sockets=2,cores=2,threads=1 \
  -object memory-backend-ram,id=near,size=384M -object memory-backend-ram,id=far,size=384M \
  -numa node,nodeid=0,cpus=0-1,memdev=near -numa node,nodeid=1,cpus=2-3,memdev=far \
  -nodefaults -no-reboot -display none -serial stdio -monitor none \
  -kernel "$folder/vmlinuz" -initrd "$folder/initrd.gz" \
  -append 'console=ttyS0 quiet panic=-1 mitigations=off hugepages=8 numa_balancing=disable' \
  </dev/null 2>&1 | tr -d '\r' | tee "$log" || status=$?
# What the guest said decides: QEMU ends well after a panic, too.
ended=$(sed -nE 's/^test-numa ended with status ([0-9]+)$/\1/p' "$log")
if [[ -z $ended ]]; then
  printf 'expected the guest to say how its tests ended, found that it did not within %s s (QEMU: status %s)\n' "$patience" "$status"
  exit 1
fi
exit "$ended"
