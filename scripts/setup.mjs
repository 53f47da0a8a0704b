// `node scripts/setup.mjs bench|demo|kernels|programs|test`: brings a bare Debian with Node to where the demo or the tests run: Debian packages, npm packages, the build.
// Says what it installs, and does nothing twice. Plain Node, as nothing is installed yet.
import {spawnSync} from 'node:child_process';
import {existsSync, readFileSync, rmSync, writeFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const purpose = process.argv[2] ?? 'build';

const BUILD = ['cmake', 'make', 'g++', 'clang-19', 'llvm-19', 'libbpf-dev', 'libelf-dev', 'zlib1g-dev', 'libuv1-dev', 'nlohmann-json3-dev'];
const TEST = ['iproute2', 'iptables', 'haproxy', 'redsocks', 'microsocks', 'curl', 'procps', 'python3-venv', 'podman', 'containernetworking-plugins', 'runc', 'buildah', 'mmdebstrap', 'prometheus'];
const PACKAGES = {
	build: BUILD,
	bench: [...BUILD, 'iproute2', 'iptables', 'procps'],
	demo: [...BUILD, 'iproute2', 'haproxy', 'curl'],
	kernels: [...BUILD, 'iproute2', 'qemu-system-x86', 'busybox-static', 'kmod', 'xz-utils'],
	test: [...BUILD, ...TEST],
	programs: [...BUILD, ...TEST, 'nginx', 'redis-server', 'redis-tools', 'postgresql'],
};

function run(command, args, why) {
	const {status, error} = spawnSync(command, args, {cwd: root, stdio: 'inherit', env: {...process.env, DEBIAN_FRONTEND: 'noninteractive'}});
	if (status !== 0) {
		console.error(`setup: ${why} failed${error ? ` (${error.message})` : ''}`);
		process.exit(1);
	}
}

if (process.getuid() !== 0) {
	console.error('setup: root is needed: network namespaces, BPF and apt-get are root\'s');
	process.exit(1);
}

// uv.h comes with NodeSource's and the official builds of Node; only Debian's own has it in libuv1-dev.
const status = spawnSync('dpkg-query', ['-W', '-f', '${db:Status-Status} ${Package}\n'], {encoding: 'utf8', maxBuffer: 1 << 26}).stdout ?? '';
const installed = new Set(status.split('\n').filter(line => line.startsWith('installed ')).map(line => line.slice(10)));
const hasTool = name => spawnSync('sh', ['-c', `command -v ${name}`]).status === 0;
const missing = PACKAGES[purpose].filter(name => !installed.has(name) && !(['cmake', 'make', 'g++'].includes(name) && hasTool(name)));
if (missing.length > 0) {
	console.log(`setup: installing Debian packages: ${missing.join(' ')}`);
	run('apt-get', ['update', '-qq'], 'apt-get update');
	// Debian starts what it installs, unless this program says no.
	const policy = '/usr/sbin/policy-rc.d';
	if (!existsSync(policy)) {
		writeFileSync(policy, '#!/bin/sh\nexit 101\n', {mode: 0o755});
		process.once('exit', () => {
			rmSync(policy);
		});
		process.once('SIGINT', () => {
			process.exit(130);
		});
	}

	run('apt-get', ['install', '-y', '-qq', '--no-install-recommends', '-o', 'Dpkg::Use-Pty=0', ...missing], 'apt-get install');
}

const lock = readFileSync(`${root}/package-lock.json`);
const stamp = `${root}/node_modules/.sidestep-lock`;
if (!existsSync(stamp) || !readFileSync(stamp).equals(lock)) {
	console.log('setup: installing npm packages (npm ci)');
	run('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], 'npm ci');
	writeFileSync(stamp, lock);
}

run('node', ['scripts/build.mjs'], 'the build');

if (purpose === 'test' || purpose === 'programs') {
	// Not from package.json: their bin/node would come before the user's own in npm's PATH.
	for (const major of [22, 24]) {
		const prefix = `${root}/.cache/node${major}`;
		if (!existsSync(`${prefix}/node_modules/node-linux-${process.arch}/bin/node`)) {
			console.log(`setup: installing Node ${major} beside, for the addon's tests`);
			run('npm', ['install', '--prefix', prefix, '--ignore-scripts', '--no-audit', '--no-fund', '--no-save', '--loglevel=error', `node-linux-${process.arch}@${major}`], `Node ${major}`);
		}
	}

	run('node', ['scripts/envoy.mjs'], 'Envoy');
}

if (purpose === 'test') {
	run('node', ['scripts/manifests.mjs'], 'kubectl');
	run('node', ['scripts/image.mjs'], 'the image');
}
