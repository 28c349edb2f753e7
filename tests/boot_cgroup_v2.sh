#!/bin/bash
# Boots a kernel with a delegated cgroup v2 and runs tests/cgroup_v2_cases.py in it as a plain user: isolation level 3 where
# the machine delegates nothing. Needs mmdebstrap, mke2fs and qemu-system-x86_64. About a minute: no KVM is needed.
#
#   tests/boot_cgroup_v2.sh DIRECTORY      one JSON line per case; DIRECTORY/root.tar is kept and reused
set -euo pipefail
[ "$#" = 1 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 64; }
mkdir -p "$1"
directory=$(cd "$1" && pwd)
project=$(cd "$(dirname "$0")/.." && pwd)
if [ ! -s "$directory/root.tar" ]; then
    mmdebstrap --quiet --variant=minbase --include=python3,util-linux,linux-image-cloud-amd64,initramfs-tools --skip=output/dev \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$directory/partial.tar"
    mv "$directory/partial.tar" "$directory/root.tar"
fi
rm -rf "$directory/tree" "$directory/disk"
mkdir -p "$directory"/tree/srv/project
tar xf "$directory/root.tar" -C "$directory/tree"
mkdir -p "$directory"/tree/{dev,proc,sys,run,tmp} "$directory/tree/srv/project/tests"
cp -r "$project/sandbox" "$directory/tree/srv/project/"
cp "$project/tests/cgroup_v2_cases.py" "$directory/tree/srv/project/tests/"
cat > "$directory/tree/srv/init" <<'INIT'
#!/bin/bash
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
for folder in /tmp /run; do mount -t tmpfs tmpfs "$folder"; done
echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control
ours=/sys/fs/cgroup/delegated
mkdir -p $ours/service
chown 1001 $ours $ours/cgroup.procs $ours/cgroup.subtree_control $ours/service $ours/service/cgroup.procs
( echo $BASHPID > $ours/service/cgroup.procs; cd /srv/project
  SBX_CGROUP_ROOT=$ours PYTHONDONTWRITEBYTECODE=1 setpriv --reuid=1001 --regid=1001 --clear-groups python3 -m tests.cgroup_v2_cases )
echo o > /proc/sysrq-trigger
sleep 5
INIT
chmod 755 "$directory/tree/srv/init"
mke2fs -q -t ext4 -d "$directory/tree" "$directory/disk" 900M
timeout 400 qemu-system-x86_64 -accel tcg -cpu max -m 1024 -smp 2 -nographic -no-reboot \
    -drive "file=$directory/disk,format=raw,if=virtio" -kernel "$directory"/tree/boot/vmlinuz-* -initrd "$directory"/tree/boot/initrd.img-* \
    -append "root=/dev/vda rootfstype=ext4 rw console=ttyS0 quiet panic=-1 init=/srv/init" < /dev/null | tr -d '\r' | tee "$directory/log"
rm -rf "$directory/tree" "$directory/disk"
