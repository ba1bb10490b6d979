#!/usr/bin/env bash
# prepare.sh FOLDER PYTHON: what tests of other CPUs need, about 90 MB to fetch.
#
# qemu-user where it is missing, which takes root; and in FOLDER a Debian of AArch64 that nothing is
# installed in: packages are unpacked, and wheels for it beside them, of the versions that PYTHON has.
set -euo pipefail

folder=$(realpath -m "$1")
python=$2
test -e "$folder/ready" && exit 0

command -v qemu-aarch64 >/dev/null || {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends qemu-user >/dev/null
}

rm -rf "$folder"
mkdir -p "$folder/apt/state/lists/partial" "$folder/apt/cache/archives/partial" "$folder/root/site"
: >"$folder/apt/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64
  -o APT::Install-Recommends=false -o Debug::NoLocking=1
  -o Dir::State="$folder/apt/state" -o Dir::State::status="$folder/apt/status"
  -o Dir::Cache="$folder/apt/cache")
"${apt[@]}" update
"${apt[@]}" -y --download-only install python3 libstdc++6 >/dev/null
for package in "$folder"/apt/cache/archives/*.deb; do
  dpkg-deb -x "$package" "$folder/root"
done

# Debian's own /lib is a link to /usr/lib; packages may hold either.
guest=$(basename "$(readlink -f "$folder/root/usr/bin/python3")")
packages=$("$python" - <<'END'
from importlib.metadata import version
names = ("numpy", "llvmlite", "safetensors", "pytest", "pluggy", "iniconfig", "packaging", "pygments")
print(*(f"{name}=={version(name)}" for name in names))
END
)
# shellcheck disable=SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels" \
  --python-version "${guest#python}" --platform manylinux2014_aarch64 \
  --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 $packages
for wheel in "$folder"/wheels/*.whl; do
  "$python" -m zipfile -e "$wheel" "$folder/root/site"
done
rm -rf "$folder/apt" "$folder/wheels"
echo "$guest" >"$folder/ready"
