// `npm run build`: the addon, the BPF object and the tests' helpers by cmake-js, then TypeScript. Silent but for a line a step, and for
// everything a failed step said.
import {spawnSync} from 'node:child_process';
import {existsSync, readFileSync, rmSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const bin = name => fileURLToPath(new URL(`../node_modules/.bin/${name}`, import.meta.url));

function step(title, command, args) {
	const started = Date.now();
	const {status, stdout, stderr, error} = spawnSync(command, args, {cwd: root, encoding: 'utf8', maxBuffer: 1 << 28});
	if (status === 0) {
		console.log(`build: ${title} (${((Date.now() - started) / 1000).toFixed(1)} s)`);
		return;
	}

	const output = `${stdout}${stderr}`;
	// CMake's own words for a missing package, without the trace around them.
	const missing = /^sidestep: .*$/m.exec(output);
	console.error(missing ? missing[0] : `${output}\nbuild: ${title} failed${error ? `: ${error.message}` : ''}`);
	process.exit(1);
}

for (const [command, install] of [['cmake', 'cmake make g++'], ['g++', 'g++']]) {
	if (spawnSync(command, ['--version']).error) {
		console.error(`sidestep: ${command} is not installed: apt-get install ${install}`);
		process.exit(1);
	}
}

if (!existsSync(bin('cmake-js'))) {
	console.error('sidestep: node_modules is not there: npm ci');
	process.exit(1);
}

// cmake-js configures only where there is no cache; one that a failed attempt or another place left behind would stay for good.
const cache = new URL('../build/CMakeCache.txt', import.meta.url);
if (existsSync(cache)) {
	const configured = ['build.ninja', 'Makefile'].some(file => existsSync(new URL(file, cache)));
	if (!configured || !readFileSync(cache, 'utf8').includes(`CMAKE_HOME_DIRECTORY:INTERNAL=${root.replace(/\/$/, '')}\n`)) {
		rmSync(new URL('.', cache), {recursive: true});
	}
}

step('addon, BPF object, test programs', bin('cmake-js'), ['build']);
step('TypeScript', bin('tsc'), ['-p', '.']);
