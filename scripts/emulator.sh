#!/bin/sh
# What `make arm` needs: a cross compiler and an emulator, Debian's packages, installed where root can. Without them
# the tests are skipped and say why.
missing=
for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    timeout 300 sh -c "apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross" >/dev/null && exit 0
    echo "not installed:$missing (apt-get failed)"
else
    echo "not installed:$missing (on Debian: apt-get install qemu-user gcc-aarch64-linux-gnu)"
fi
