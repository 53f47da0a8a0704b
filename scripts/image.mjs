// Builds the agent's image for the tests, into a store of its own, with a base made of Debian's packages: no image registry is asked. Does nothing if nothing changed.
import {spawnSync} from 'node:child_process';
import {createHash} from 'node:crypto';
import {existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const home = `${root}/.cache/image`;
const store = ['--root', `${home}/store`, '--runroot', `${home}/run`];
const BASE = 'localhost/sidestep-base:trixie';
const TOOLS = 'localhost/sidestep-tools';
const IMAGE = 'localhost/sidestep:test';

function run(command, args) {
	const {status, stdout, stderr, error} = spawnSync(command, args, {cwd: root, encoding: 'utf8', maxBuffer: 1 << 28});
	if (status !== 0) {
		console.error(`setup: ${command} ${args.join(' ')} failed${error ? ` (${error.message})` : ''}\n${stdout}${stderr}`);
		process.exit(1);
	}
}

function step(title, act) {
	const started = Date.now();
	act();
	console.log(`setup: ${title} (${((Date.now() - started) / 1000).toFixed(0)} s)`);
}

const exists = image => spawnSync('podman', [...store, 'image', 'exists', image]).status === 0;

/** All that .dockerignore lets into the build. */
function context() {
	const wanted = readFileSync(`${root}/.dockerignore`, 'utf8').split('\n').filter(line => line.startsWith('!')).map(line => line.slice(1));
	const files = path => statSync(`${root}/${path}`).isDirectory() ? readdirSync(`${root}/${path}`).sort().flatMap(name => files(`${path}/${name}`)) : [path];
	const hash = createHash('sha256');
	for (const file of [...wanted.flatMap(files), '.dockerignore', 'daemonset/Dockerfile']) {
		hash.update(`${file}\0`).update(readFileSync(`${root}/${file}`));
	}

	return hash.digest('hex');
}

mkdirSync(home, {recursive: true});
if (!exists(BASE)) {
	step('made a Debian base for the image', () => {
		const tar = `${home}/base.tar`;
		// Where the registries are reached by an authority of this machine's own, npm has to know it inside as well.
		const certificates = '/etc/ssl/certs/ca-certificates.crt';
		const hooks = existsSync(certificates) ? [`--customize-hook=mkdir -p "$1/etc/ssl" && cp ${certificates} "$1/etc/ssl/machine.crt" && echo cafile=/etc/ssl/machine.crt > "$1/etc/npmrc"`] : [];
		run('mmdebstrap', ['--quiet', '--variant=minbase', ...hooks, 'trixie', tar]);
		run('podman', [...store, 'import', '--quiet', tar, BASE]);
		rmSync(tar);
	});
}

const build = ['bud', '--quiet', '--isolation', 'chroot', '--layers', '--build-arg', `BASE=${BASE}`, '--file', 'daemonset/Dockerfile'];
const stamp = `${home}/built`;
const inputs = context();
if (!exists(IMAGE) || !existsSync(stamp) || readFileSync(stamp, 'utf8') !== inputs) {
	step('built the tools of the agent\'s image', () => {
		run('buildah', [...store, ...build, '--target', 'tools', '--tag', TOOLS, '.']);
	});
	step('built the agent\'s image', () => {
		run('buildah', [...store, ...build, '--tag', IMAGE, '.']);
	});
	writeFileSync(stamp, inputs);
	// Of former builds. What has a name, or is below what has one, stays.
	run('podman', [...store, 'image', 'prune', '--force']);
}
