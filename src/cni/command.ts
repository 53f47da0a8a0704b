import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {Option, type Command} from 'commander';
import {integer} from '../arguments.js';
import type {Environment} from '../cli/environment.js';
import {CniInstaller, DEFAULT_CNI_TIMEOUT_SECONDS, PLUGIN_NAME} from './install.js';
import {DEFAULT_CNI_SOCKET} from './server.js';

/** The plugin as `npm run build` made it. */
export const BUILT_PLUGIN = fileURLToPath(new URL(`../../../build/${PLUGIN_NAME}`, import.meta.url));
export const DEFAULT_CNI_BIN = '/opt/cni/bin';
export const DEFAULT_CNI_CONF = '/etc/cni/net.d';

interface Options {
	readonly cniBin: string;
	readonly cniConf: string;
	readonly cniSocket: string;
	readonly cniTimeout: number;
}

export const cniBinOption = () => new Option('--cni-bin <directory>', 'where the container runtime looks for plugins').env('SIDESTEP_CNI_BIN').default(DEFAULT_CNI_BIN);
export const cniConfOption = () => new Option('--cni-conf <directory>', 'where the container runtime looks for networks').env('SIDESTEP_CNI_CONF').default(DEFAULT_CNI_CONF);
/** From 1 to 600, as the plugin takes it. */
export const cniTimeoutOption = () => new Option('--cni-timeout <seconds>', 'how long a pod\'s start is held').env('SIDESTEP_CNI_TIMEOUT').argParser(integer(1, 600)).default(DEFAULT_CNI_TIMEOUT_SECONDS);

/** Adds `cni install` and `cni uninstall`. */
export function addCniCommand(program: Command, {stderr}: Pick<Environment, 'stderr'>): void {
	const installer = ({cniBin, cniConf, cniSocket = DEFAULT_CNI_SOCKET, cniTimeout = DEFAULT_CNI_TIMEOUT_SECONDS}: Partial<Options>) => new CniInstaller({
		binary: BUILT_PLUGIN, binDir: path.resolve(cniBin!), confDir: path.resolve(cniConf!), socketPath: cniSocket, timeoutSeconds: cniTimeout,
		log(line) {
			stderr(`${line}\n`);
		},
	});

	const command = program.command('cni').description('the CNI plugin, which holds a pod\'s start until the pod is captured');
	command.command('install')
		.description('put the plugin in place, once (`sidestep run` does that itself, and keeps it there)')
		.addOption(cniBinOption())
		.addOption(cniConfOption())
		.addOption(new Option('--cni-socket <path>', 'the agent\'s socket, as the host sees it').env('SIDESTEP_CNI_SOCKET').default(DEFAULT_CNI_SOCKET))
		.addOption(cniTimeoutOption())
		.action((options: Options) => {
			installer(options).install();
		});
	command.command('uninstall')
		.description('take the plugin out again once the agent is removed for good: while the plugin is in place and no agent answers, no pod starts')
		.addOption(cniBinOption())
		.addOption(cniConfOption())
		.option('--keep-file', 'leave the plugin\'s file: under CRI-O, pods that started with it need it to end', false)
		.action((options: Options & {keepFile: boolean}) => {
			installer(options).uninstall({keepFile: options.keepFile});
		});
}
