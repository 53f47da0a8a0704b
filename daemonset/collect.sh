#!/bin/sh
# Puts what the agent runs with below the directory $1, from the build tree in the working directory: Node, the built agent, its npm packages, and the Debian
# libraries that Node and the addon load, with the names that vulnerability scanners look for (/var/lib/dpkg/status.d, as in Google's distroless images).
set -eu
image=$1
agent=$image/opt/sidestep

mkdir -p "$image/usr/bin" "$image/usr/lib" "$image/usr/lib64" "$image/run" "$image/var/lib/dpkg/status.d" "$image/etc" "$agent/dist" "$agent/build/Release"
ln -s usr/lib "$image/lib"
ln -s usr/lib64 "$image/lib64"
ln -s ../run "$image/var/run"
cp /etc/os-release "$image/etc/"

cp -r package.json node_modules "$agent/"
cp -r dist/src "$agent/dist/"
find "$agent" -name '*.map' -delete
cp build/sidestep.bpf.o build/sidestep-cni "$agent/build/"
strip -o "$agent/build/Release/sidestep.node" build/Release/sidestep.node
strip -o "$image/usr/bin/node" "$(readlink -f "$(command -v node)")"
# There is no env(1) in the image.
sed -i '1s|.*|#!/usr/bin/node|' "$agent/dist/src/cli/main.js"
chmod 755 "$agent/dist/src/cli/main.js"
ln -s ../../opt/sidestep/dist/src/cli/main.js "$image/usr/bin/sidestep"

# "libbpf.so.1 => /lib/…/libbpf.so.1 (0x…)", and the loader without an arrow.
ldd "$image/usr/bin/node" "$agent/build/Release/sidestep.node" | sed -n 's|.*[[:space:]]\(/[^ ]*\) (0x.*|\1|p' | sort -u | while read -r library; do
	directory=$(readlink -f "$(dirname "$library")")
	mkdir -p "$image$directory"
	cp -L "$library" "$image$directory/"
	package=$(dpkg-query -S "$(readlink -f "$library")" | sed 's/:.*//')
	dpkg-query -s "$package" > "$image/var/lib/dpkg/status.d/$package"
	mkdir -p "$image/usr/share/doc/$package"
	cp -L "/usr/share/doc/$package/copyright" "$image/usr/share/doc/$package/"
done
