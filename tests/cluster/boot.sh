#!/bin/bash
# The first process of a host, in namespaces of its own.
#
#   boot.sh NAME ETC [FOLDER …]      ETC: what is mounted over /etc; FOLDER: under /tmp, what all hosts share of it
set -euo pipefail

name=$1 etc=$2
shift 2
hostname "$name"
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/munge /run/slurm /run/shared
mount --bind /tmp /run/shared
mount -t tmpfs tmpfs /tmp
for folder in "$@"; do
    mkdir -p "$folder"
    mount --bind "/run/shared/${folder#/tmp/}" "$folder"
done
umount --lazy /run/shared
for file in hosts resolv.conf ssh/ssh_config; do mount --bind "$etc/$file" "/etc/$file"; done
mount --bind "$etc/slurm" /etc/slurm
ip link set lo up
touch "$etc/up.$name"
exec tini -s -- sleep infinity
