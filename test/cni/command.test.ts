import {mkdirSync, readFileSync, readdirSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import test from 'ava';
import {main} from '../../src/cli/program.js';
import {directory} from './plugin.js';

const CHAIN = {cniVersion: '1.0.0', name: 'pods', plugins: [{type: 'ptp'}]};

async function sidestep(...args: readonly string[]): Promise<{code: number; stdout: string; stderr: string}> {
	let stdout = '';
	let stderr = '';
	const code = await main(args, {
		stdout(text) {
			stdout += text;
		},
		stderr(text) {
			stderr += text;
		},
		signal: new AbortController().signal,
	});
	return {code, stdout, stderr};
}

test('cni install and uninstall, by hand', async t => {
	const base = directory(t);
	const [bin, conf] = [path.join(base, 'bin'), path.join(base, 'net.d')];
	const where = ['--cni-bin', bin, '--cni-conf', conf];
	mkdirSync(conf);
	const file = path.join(conf, '10-pods.conflist');
	t.is((await sidestep('cni', 'install', ...where)).code, 1, 'no network yet');
	writeFileSync(file, JSON.stringify(CHAIN));
	const installed = await sidestep('cni', 'install', ...where, '--cni-socket', '/run/x.sock', '--cni-timeout', '7');
	t.is(installed.code, 0, installed.stderr);
	t.deepEqual(JSON.parse(readFileSync(file, 'utf8')), {...CHAIN, plugins: [...CHAIN.plugins, {type: 'sidestep-cni', socket: '/run/x.sock', timeoutSeconds: 7}]});
	t.is((await sidestep('cni', 'uninstall', ...where, '--keep-file')).code, 0);
	t.deepEqual(readdirSync(bin), ['sidestep-cni']);
	t.is((await sidestep('cni', 'uninstall', ...where)).code, 0);
	t.deepEqual(readdirSync(bin), []);
	t.deepEqual(JSON.parse(readFileSync(file, 'utf8')), CHAIN);
});

test('misuse', async t => {
	for (const timeout of ['0', '601', '1.5', 'x', '']) {
		t.is((await sidestep('cni', 'install', '--cni-timeout', timeout, '--cni-bin', '/nonexistent/bin', '--cni-conf', '/nonexistent/conf')).code, 2);
	}

	t.is((await sidestep('cni', '--help')).code, 0);
	t.is((await sidestep('cni', 'instal')).code, 2);
});
